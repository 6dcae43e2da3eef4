// How every launch here is cut: rows into steps, features into tasks, a task among warps. What a task
// is, Tasks says, in a file that follows.

// Of a row: S steps of STEP bytes; a chunk is 16.
constexpr int ROW_BYTES = FOUR ? COLUMNS / 2 : COLUMNS;
constexpr int S = (ROW_BYTES + STEP - 1) / STEP;
constexpr int CHUNK_COLS = FOUR ? 32 : 16, STEP_COLS = STEP / 16 * CHUNK_COLS;
// Of an expert: where rows lie.
constexpr int SHARD_STEP = INTERLEAVED ? 1 : FEATURES, ROW_STEP = INTERLEAVED ? 2 : 1;
constexpr i64 EXPERT_ROWS = GATED ? 2 * FEATURES : FEATURES;
// Of a task: BN slots, FT features; FM of a tile of 16 rows.
constexpr int WARPS = KW * WM;
constexpr int BN = 8 * NT;
constexpr int FM = GATED ? 8 : 16;
constexpr int FT = WM * MT * FM;
constexpr int TILES = (FEATURES + FT - 1) / FT;
constexpr int TILE_BYTES = MT * 16 * STEP;  // a warp's rows of a step
// Of scales: whether they come with the weights, columns that share one; SPAN steps' travel together,
// at most 32 bytes, a sector, of each row, PITCH bytes from row to row.
constexpr bool RINGED = GROUP != 0;
constexpr int WIDTH = GROUP == 0 ? COLUMNS : GROUP;
constexpr int SPAN_BYTES = RINGED ? MT * 16 * PITCH : 0;
constexpr int SCALES_BYTES = SPANS * SPAN_BYTES * (ZERO ? 2 : 1);
// Whether groups are summed by themselves.
constexpr bool FOLD = RINGED || ELEMENT == INT4;

typedef float Accumulators[MT][NT][4];

DEVICE void clear(Accumulators& acc) {
#pragma unroll
  for (int i = 0; i < MT * NT * 4; i++) acc[i / 4 / NT][i / 4 % NT][i % 4] = 0.0f;
}
DEVICE int turn(int i, int count) { return i + 1 == count ? 0 : i + 1; }
// Steps of all tasks of a block, in order, each with its place in a ring.
struct Turns {
  int stage = 0, phase = 0;
  DEVICE void next() {
    stage = turn(stage, STAGES);
    phase ^= stage == 0;
  }
};
DEVICE int first_group(int k) { return RINGED ? k * STEP_COLS / WIDTH : 0; }

// A warp of a block, a thread of it, and the steps that are its part of every task.
struct Place {
  int lane, warp, kw, wm, g, t, k_begin, k_end;
};
// ``turned``: warps side by side begin with another part each, so that longer ones are spread over the
// schedulers, which have every fourth warp.
DEVICE Place find_place(bool turned = false) {
  Place p;
  p.lane = threadIdx.x & 31, p.warp = threadIdx.x >> 5;
  p.wm = p.warp / KW, p.kw = (p.warp + (turned ? p.wm : 0)) % KW;
  p.g = p.lane >> 2, p.t = p.lane & 3;
  p.k_begin = p.kw * S / KW, p.k_end = (p.kw + 1) * S / KW;
  return p;
}

// Where a warp is: step k of the rows of a task.
struct Walk {
  int task, k;

  template <class Tasks>
  DEVICE bool advance(const Place& p, const Tasks& tasks) {  // whether to another task
    if (++k < p.k_end) return false;
    task = tasks.next(task);
    k = p.k_begin;
    return true;
  }
};

// Sums of the warps that share tiles, by way of ``parts``, where EACH threads of a warp have some, this
// one ``own`` if it ``has``: each tile's go to ``store`` in one of the warps.
template <int EACH, class Store>
DEVICE void add_up(const Place& p, const Accumulators& acc, float4* parts, int own, bool has,
                   const Store& store) {
  if (KW == 1) {
#pragma unroll
    for (int i = 0; i < MT * NT; i++) store(i / NT, i % NT, acc[i / NT][i % NT]);
    return;
  }
  parts += p.wm * KW * MT * NT * EACH + own;
#pragma unroll
  for (int i = 0; i < MT * NT; i++) {
    const float(&mine)[4] = acc[i / NT][i % NT];
    if (has) parts[(i * KW + p.kw) * EACH] = make_float4(mine[0], mine[1], mine[2], mine[3]);
  }
  meet<KW * 32>(1 + p.wm);
#pragma unroll
  for (int i = 0; i < MT * NT; i++) {
    if (i % KW != p.kw) continue;
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < KW; j++) {
      const float4 part = parts[(i * KW + j) * EACH];
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
    store(i / NT, i % NT, v);
  }
}
