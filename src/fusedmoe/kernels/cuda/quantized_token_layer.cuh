// What quantized_token.cu and quantized_token_rows.cu have in common: which part of a token's layer is
// a block's, scales and biases, the ends of both GEMMs.
//
// A block has neighbouring tiles of w1 and its own features of out, of which it has all picks and
// adds them up itself, in their order. act goes through global memory; all blocks meet in between.
// Their word stays as it is for the next launch. Two launches never meet at it: each block has a
// multiprocessor to itself, so that a launch that another stream begins has not all of its blocks
// before the last one of this has ended.

struct Arguments {
  TensorMap first, second;  // boxes of w1 and w2, of quantized_token.cu
  const u8* first_rows;
  const u8* second_rows;
  const u8* first_scale;
  const u8* second_scale;
  const void* first_bias;
  const void* second_bias;
  const u16* x;
  u16* act;  // [picks, INTERMEDIATE]
  u16* out;
  const float* pick_weights;
  const void* ids;
  const int* map;
  int R, num_mapped, num_local;
  float limit, alpha, beta;
};

__device__ u32 meeting;

// A chunk of a row is 16 bytes, an octet eight of them.
constexpr int CHUNK_COLS = 32, OCTET_BYTES = 128, OCTET_COLS = 256;
// Tiles of w1: FM features, 16 rows. Of w2: eight features (a unit) of two picks (a pair).
constexpr int FM = GATED ? 8 : 16, SHARDS = GATED ? 2 : 1;
constexpr int UP_TILES = INTERMEDIATE / FM, UNITS = HIDDEN / 8, PAIRS = (PICKS + 1) / 2;
constexpr int UP_OCTETS = (HIDDEN + OCTET_COLS - 1) / OCTET_COLS;
constexpr int DOWN_OCTETS = (INTERMEDIATE + OCTET_COLS - 1) / OCTET_COLS;
// So many warps share a tile, and have so many octets each; others are side by side.
constexpr int UP_WM = WARPS / UP_KW, UP_OWN = (UP_OCTETS + UP_KW - 1) / UP_KW;
constexpr int DOWN_WM = WARPS / DOWN_KW, DOWN_OWN = (DOWN_OCTETS + DOWN_KW - 1) / DOWN_KW;
// Of a row of scales.
constexpr int UP_SCALES = HIDDEN / GROUP, DOWN_SCALES = INTERMEDIATE / GROUP;
constexpr int UP_ROW = UP_SCALES * SCALE_BYTES, DOWN_ROW = DOWN_SCALES * SCALE_BYTES;

// Where things lie in shared memory: a ring, scales and biases of all tiles, sums, barriers (of the
// scales, of the ring), picks.
constexpr int UP_SCALES_AT = RING_BYTES;
constexpr int DOWN_SCALES_AT = UP_SCALES_AT + MOST_TILES * 16 * UP_ROW;
constexpr int UP_BIASES_AT = DOWN_SCALES_AT + PICKS * MOST_UNITS * 8 * DOWN_ROW;
constexpr int DOWN_BIASES_AT = UP_BIASES_AT + MOST_TILES * 16 * BIAS_BYTES;
constexpr int SUMS_AT = DOWN_BIASES_AT + PICKS * MOST_UNITS * 8 * BIAS_BYTES;
constexpr int BARRIERS_AT = SUMS_AT + MOST_SUMS * 64, RING_BARRIERS_AT = BARRIERS_AT + 16;
constexpr int LIVE_AT = RING_BARRIERS_AT + RING_BARRIERS * 8;
constexpr int END_AT = LIVE_AT + 8 * PICKS + 8;

// The picks that have an expert here, in their order.
struct Live {
  int experts[PICKS];
  float weights[PICKS];
  int count;
};
DEVICE void find_live(const Arguments& a, Live& live) {
  const int lane = threadIdx.x & 31;
  const bool weighted = a.pick_weights && lane < a.R;
  const int weight = weighted ? load_past_l1((const int*)a.pick_weights + lane) : 0;
  const int expert = lone_expert(a, lane);
  const u32 all = lanes_with(expert >= 0);
  const int rank = __popc(all & ((1u << lane) - 1));
  if (expert >= 0) {
    live.experts[rank] = expert;
    live.weights[rank] = weighted ? as_float(weight) : 1.0f;
  }
  if (lane == 0) live.count = __popc(all);
}

// What is this block's: neighbouring tiles of all live picks, and units.
struct Part {
  int tile, tiles, unit, units, pairs;
  DEVICE Part(int live) {
    const int all = live * UP_TILES;
    tile = all * blockIdx.x / BLOCKS;
    tiles = all * (blockIdx.x + 1) / BLOCKS - tile;
    unit = UNITS * blockIdx.x / BLOCKS;
    units = UNITS * (blockIdx.x + 1) / BLOCKS - unit;
    pairs = (live + 1) / 2;
  }
};

// Where row r of a tile of w1 (GATED: eight of gate, eight of up) lies among the tile's rows in memory,
// as their scales and biases do here.
DEVICE int up_row(int r) { return INTERLEAVED ? r % 8 * 2 + r / 8 : r; }

// Scales and biases of all tiles of this block, in runs of neighbouring rows; one thread of each warp.
struct Runs {
  const Arguments& a;
  const Live& live;
  const Part& part;
  u32 memory;

  DEVICE void up(int warp) const {
    constexpr int RUNS = INTERLEAVED ? 1 : SHARDS, ROWS = 16 / RUNS;
    const u32 barrier = memory + BARRIERS_AT;
    if (warp == 0) expect(barrier, part.tiles * 16 * (UP_ROW + (FIRST_BIAS ? BIAS_BYTES : 0)));
#pragma unroll 1
    for (int i = warp; i < part.tiles * RUNS; i += WARPS) {
      const int tile = part.tile + i / RUNS;
      const i64 row = live.experts[tile / UP_TILES] * (i64)(SHARDS * INTERMEDIATE) +
                      tile % UP_TILES * ROWS + i % RUNS * INTERMEDIATE;
      copy_bytes(memory + UP_SCALES_AT + i * ROWS * UP_ROW, a.first_scale + row * UP_ROW,
                 ROWS * UP_ROW, barrier);
      if (FIRST_BIAS)
        copy_bytes(memory + UP_BIASES_AT + i * ROWS * BIAS_BYTES,
                   (const u8*)a.first_bias + row * BIAS_BYTES, ROWS * BIAS_BYTES, barrier);
    }
  }
  DEVICE void down(int warp) const {
    const u32 barrier = memory + BARRIERS_AT + 8;
    const int rows = part.units * 8;
    if (warp == 0)
      expect(barrier, live.count * rows * (DOWN_ROW + (SECOND_BIAS ? BIAS_BYTES : 0)));
#pragma unroll 1
    for (int i = warp; i < live.count && rows > 0; i += WARPS) {
      const i64 row = live.experts[i] * (i64)HIDDEN + part.unit * 8;
      copy_bytes(memory + DOWN_SCALES_AT + i * MOST_UNITS * 8 * DOWN_ROW,
                 a.second_scale + row * DOWN_ROW, rows * DOWN_ROW, barrier);
      if (SECOND_BIAS)
        copy_bytes(memory + DOWN_BIASES_AT + i * MOST_UNITS * 8 * BIAS_BYTES,
                   (const u8*)a.second_bias + row * BIAS_BYTES, rows * BIAS_BYTES, barrier);
    }
  }
};
template <int TYPE>
DEVICE float bias_at(const u8* biases, int index) {
  return TYPE ? number<TYPE - 1>(bits_at<TYPE - 1>(biases, index)) : 0.0f;
}
// Of a chunk, in a row at ``row`` that has so many; columns beyond the last are zero.
template <int SCALES>
DEVICE float scale_of(u32 row, int chunk) {
  return stored_scale(row + min(chunk * CHUNK_COLS / GROUP, SCALES - 1) * SCALE_BYTES);
}

// Sums of whole rows are in the order of memory; others have gate's rows before up's, and no unit.
constexpr float SUM_UNIT = WHOLE_ROWS ? UNIT : 1.0f;

// A barrier of the warps that multiply.
DEVICE void meet_warps() { meet<WARPS * 32>(1); }

// act of this block's tiles, of sums [tiles, UP_KW, 16]; then everybody's is there.
DEVICE void finish_up(const Arguments& a, const Part& part, const float* sums, const u8* biases) {
  meet_warps();
  for (int i = threadIdx.x; i < part.tiles * FM; i += WARPS * 32) {
    const int tile = i / FM, own = i % FM;
    float v[SHARDS];
#pragma unroll
    for (int shard = 0; shard < SHARDS; shard++) {
      const int row = up_row(shard * 8 + own);
      const float* from = sums + tile * UP_KW * 16 + (WHOLE_ROWS ? row : shard * 8 + own);
      v[shard] = 0.0f;
#pragma unroll
      for (int j = 0; j < UP_KW; j++) v[shard] += from[j * 16];
      v[shard] = fmaf(v[shard], SUM_UNIT, bias_at<FIRST_BIAS>(biases, tile * 16 + row));
    }
    const float value =
        GATED ? gated(v[0], v[SHARDS - 1], a.limit, a.alpha, a.beta) : plain(v[0]);
    // Tiles of picks follow one another, as rows of act do.
    a.act[part.tile * FM + i] = float_bf16(value);
  }
  meet_warps();
  if (threadIdx.x == 0) meet_grid(&meeting);
  meet_warps();
}
// out of this block's units, of sums [pairs * MOST_UNITS, DOWN_KW, 2 * 8].
DEVICE void finish_down(const Arguments& a, const Live& live, const Part& part, const float* sums,
                        const u8* biases) {
  meet_warps();
  for (int i = threadIdx.x; i < part.units * 8; i += WARPS * 32) {
    float all = 0.0f;
    for (int rank = 0; rank < live.count; rank++) {
      const float* from = sums + (rank / 2 * MOST_UNITS + i / 8) * DOWN_KW * 16 + rank % 2 * 8 + i % 8;
      float value = 0.0f;
#pragma unroll
      for (int j = 0; j < DOWN_KW; j++) value += from[j * 16];
      value = fmaf(value, SUM_UNIT, bias_at<SECOND_BIAS>(biases, rank * MOST_UNITS * 8 + i));
      all = fmaf(live.weights[rank], value, all);
    }
    a.out[part.unit * 8 + i] = float_bf16(all);
  }
}
