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

// Of a row: S steps of STEP bytes; a beat is 64 bytes, a chunk 16.
constexpr int ROW_BYTES = FOUR ? COLUMNS / 2 : COLUMNS;
constexpr int S = (ROW_BYTES + STEP - 1) / STEP;
constexpr int BEATS = STEP / 64;
constexpr int CHUNK_COLS = FOUR ? 32 : 16;
constexpr int BEAT_COLS = 4 * CHUNK_COLS;
constexpr int STEP_COLS = BEATS * BEAT_COLS;
// Of an expert: where rows lie.
constexpr int SHARD_STEP = INTERLEAVED ? 1 : FEATURES, ROW_STEP = INTERLEAVED ? 2 : 1;
constexpr int ROW_STRIDE = ROW_STEP * ROW_BYTES;
constexpr int HALF_OFFSET = GATED ? SHARD_STEP * ROW_BYTES : 8 * ROW_STRIDE;
constexpr i64 EXPERT_ROWS = GATED ? 2 * FEATURES : FEATURES;
// Of a task: BN slots, FT features; FM of a tile of 16 rows.
constexpr int WARPS = KW * WM;
constexpr int BN = 8 * NT;
constexpr int FM = GATED ? 8 : 16;
constexpr int FT = WM * MT * FM;
constexpr int TILES = (FEATURES + FT - 1) / FT;
// Of scales: whether they come with the weights; how many chunks share one; how many belong to a
// step; SPAN steps' travel together, 32 bytes, a sector, of each row.
constexpr bool RINGED = GROUP != 0;
constexpr int WIDTH = GROUP == 0 ? COLUMNS : GROUP;
constexpr int GC = SCALED || WIDTH >= BEAT_COLS ? 4 : WIDTH / CHUNK_COLS;
constexpr bool ONE_PER_STEP = WIDTH >= STEP_COLS;
constexpr int PITCH = 36;  // no two of eight rows begin in one bank
constexpr int SPAN_BYTES = RINGED ? MT * 16 * PITCH : 0;
// Of a warp's ring.
constexpr int TILE_BYTES = MT * 16 * STEP;
constexpr int RING_BYTES = STAGES * TILE_BYTES + SPANS * SPAN_BYTES * (ZERO ? 2 : 1);

DEVICE int turn(int i, int count) { return i + 1 == count ? 0 : i + 1; }
DEVICE int first_group(int k) { return RINGED ? k * STEP_COLS / WIDTH : 0; }

// A warp of a block, a thread of it, and the steps that are its part of every task.
struct Place {
  int lane, warp, kw, wm, g, t, k_begin, k_end;
};
DEVICE Place find_place() {
  Place p;
  p.lane = threadIdx.x & 31, p.warp = threadIdx.x >> 5;
  p.kw = p.warp % KW, p.wm = p.warp / KW;
  p.g = p.lane >> 2, p.t = p.lane & 3;
  p.k_begin = p.kw * S / KW, p.k_end = (p.kw + 1) * S / KW;
  return p;
}

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

// Where a warp is: step k of the rows of a task.
struct Walk {
  int task, k;

  DEVICE bool advance(const Place& p, const Tasks& tasks) {  // whether to another task
    if (++k < p.k_end) return false;
    task = tasks.next(task);
    k = p.k_begin;
    return true;
  }
};
