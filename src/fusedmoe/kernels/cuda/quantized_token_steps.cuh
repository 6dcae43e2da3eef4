// How quantized_token.cu cuts the two GEMMs of a token: what is a block's and what a warp's, in which
// order, and the copies that bring it.

struct Arguments {
  TensorMap first, second;  // boxes of w1 and w2
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

// A chunk of a row is 16 bytes, an octet eight of them; a place of a ring has an octet of 16 rows.
constexpr int CHUNK_COLS = 32, OCTET_BYTES = 128, OCTET_COLS = 256, PLACE_BYTES = 16 * OCTET_BYTES;
// Tiles of w1: FM features. Of w2: eight features (a unit) of two picks (a pair).
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

// Where things lie in shared memory: rings, scales and biases of all tiles, sums, barriers, picks.
constexpr int UP_SCALES_AT = WARPS * STAGES * PLACE_BYTES;
constexpr int DOWN_SCALES_AT = UP_SCALES_AT + MOST_TILES * 16 * UP_ROW;
constexpr int UP_BIASES_AT = DOWN_SCALES_AT + PICKS * MOST_UNITS * 8 * DOWN_ROW;
constexpr int DOWN_BIASES_AT = UP_BIASES_AT + MOST_TILES * 16 * BIAS_BYTES;
constexpr int SUMS_AT = DOWN_BIASES_AT + PICKS * MOST_UNITS * 8 * BIAS_BYTES;
constexpr int BARRIERS_AT = SUMS_AT + MOST_SUMS * 64;
constexpr int LIVE_AT = BARRIERS_AT + 16 + WARPS * STAGES * 8;

// The picks that have an expert here, in their order.
struct Live {
  int experts[PICKS];
  float weights[PICKS];
  int count;
};

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

// Where row r of a tile of w1 lies among the tile's scales and biases, which lie as in memory.
DEVICE int up_row(int r) { return INTERLEAVED ? r % 8 * 2 + r / 8 : r; }

// This warp's steps through both GEMMs, in order, and the ring that they come by.
struct Steps {
  const Arguments& a;
  const Live& live;
  const Part& part;
  u32 ring, full;
  int up_wm, up_kw, down_wm, down_kw, before, all;  // steps of w1, and of both
  int at = 0, stage = 0, phase = 0;

  DEVICE Steps(const Arguments& a, const Live& live, const Part& part, u32 memory)
      : a(a), live(live), part(part) {
    const int warp = threadIdx.x >> 5;
    ring = memory + warp * STAGES * PLACE_BYTES;
    full = memory + BARRIERS_AT + 16 + warp * STAGES * 8;
    up_wm = warp / UP_KW, up_kw = warp % UP_KW, down_wm = warp / DOWN_KW, down_kw = warp % DOWN_KW;
    before = max(part.tiles - up_wm + UP_WM - 1, 0) / UP_WM * UP_OWN;
    all = before + (part.pairs * MOST_UNITS - down_wm + DOWN_WM - 1) / DOWN_WM * DOWN_OWN;
  }
  // Asks for a step, by one thread: a box of w1, or of w2 one for each pick of a pair.
  DEVICE void issue(int step, int place) const {
    if (step >= all) return;
    const bool is_up = step < before;
    const int i = is_up ? step / UP_OWN * UP_WM + up_wm + part.tile
                        : (step - before) / DOWN_OWN * DOWN_WM + down_wm;
    const int octet = is_up ? up_kw * UP_OWN + step % UP_OWN
                            : down_kw * DOWN_OWN + (step - before) % DOWN_OWN;
    const int rank = is_up ? i / UP_TILES : i / MOST_UNITS * 2;
    const int row = is_up ? i % UP_TILES * FM : (part.unit + i % MOST_UNITS) * 8;
    // Other blocks may have a unit more; the last pick may have no other beside it.
    const bool none = !is_up && i % MOST_UNITS >= part.units;
    const int boxes = is_up ? 1 : none ? 0 : min(2, live.count - rank);
    const int bytes = is_up ? PLACE_BYTES : PLACE_BYTES / 2;
    const TensorMap& map = is_up ? a.first : a.second;
    expect(full + place * 8, boxes * bytes);
#pragma unroll 1
    for (int j = 0; j < boxes; j++)
      copy_box(ring + place * PLACE_BYTES + j * bytes, map, octet * OCTET_BYTES, row,
               live.experts[rank + j], full + place * 8);
  }
  DEVICE void begin() const {
    const int lane = threadIdx.x & 31;
    if (lane < STAGES) issue(lane, lane);
    __syncwarp();
  }
  // Until the next ``steps`` are here, and where one of them is.
  DEVICE void wait(int steps) const {
    int place = stage, own = phase;
    for (int i = 0; i < steps; i++) {
      wait_barrier(full + place * 8, own);
      place = place + 1 == STAGES ? 0 : place + 1;
      own ^= place == 0;
    }
  }
  DEVICE u32 place(int step) const {
    const int own = stage + step;
    return ring + (own < STAGES ? own : own - STAGES) * PLACE_BYTES;
  }
  // The numbers of the last ``steps`` have been used: sums that need them are there.
  DEVICE void next(int steps) {
    __syncwarp();
    const int lane = threadIdx.x & 31, step = at + lane + STAGES;
    if (lane < steps) issue(step, step % STAGES);
    at += steps, stage += steps;
    if (stage >= STAGES) stage -= STAGES, phase ^= 1;
  }
};

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
