// What a launch of quantized_warps.cu is cut into, and its parameter.

struct Arguments {
  const u8* weights;
  const u8* scale;
  const float* scale2;
  const u8* zero;
  const void* bias;
  const u16* x;
  void* out;
  const int* experts;
  const int* sorted;
  const int* num_post;
  i64 stride_x;  // elements
  int R, num_local, last_block;
  float limit, alpha, beta;
};

// Of a row: a beat is 64 bytes.
constexpr int BEATS = STEP / 64, BEAT_COLS = 4 * CHUNK_COLS;
// Of an expert: from row to row of a tile, and to its other half.
constexpr int ROW_STRIDE = ROW_STEP * ROW_BYTES;
constexpr int HALF_OFFSET = GATED ? SHARD_STEP * ROW_BYTES : 8 * ROW_STRIDE;
// How many chunks share a scale, a beat's at most, and whether more than a step does.
constexpr int GC = SCALED || WIDTH >= BEAT_COLS ? 4 : WIDTH / CHUNK_COLS;
constexpr bool ONE_PER_STEP = WIDTH >= STEP_COLS;
// Of a warp's ring.
constexpr int RING_BYTES = STAGES * TILE_BYTES + SCALES_BYTES;

struct Tasks {
  const Arguments& a;
  int count;

  DEVICE int next(int task) const { return task + gridDim.x; }
  // ``early``: before the launch in front has ended.
  DEVICE int expert(int task, bool early = false) const {
    const int* at = a.experts + min(task / TILES, a.last_block);
    return min(max(early ? load_past_l1(at) : *at, 0), a.num_local - 1);
  }
};

// The first feature of a tile of 16 rows; an expert's last ones are done twice where they must.
DEVICE int feature(const Place& p, int task, int mt) {
  const int first = task % TILES * FT + (p.wm * MT + mt) * FM;
  return FEATURES % FT ? min(first, FEATURES - FM) : first;
}
// The row of scales that belongs to row r (of 16) of a tile.
DEVICE int scale_row(const Place& p, int task, int mt, int r) {
  const int f = feature(p, task, mt) + (GATED ? r & 7 : r);
  return (GATED && r >= 8 ? SCALE_SHARD : 0) + f / SCALE_BLOCK * SCALE_STEP;
}

