// What a launch of quantized_lone.cu or quantized_stream.cu is cut into, and its parameter.

struct Arguments {
  TensorMap tiles;
  const u8* scale;
  const float* scale2;
  const u8* zero;
  const void* bias;
  const u16* x;
  void* out;
  const void* ids;
  const int* map;
  const int* experts;
  const int* sorted;
  const int* num_post;
  i64 stride_x;  // elements
  int R, num_mapped, num_local, last_block, guess;
  float limit, alpha, beta;
};

// Of a row: S steps of STEP bytes, a line; CHUNKS of a step, 16 bytes each.
constexpr int STEP = 128, CHUNKS = STEP / 16;
constexpr int ROW_BYTES = FOUR ? COLUMNS / 2 : COLUMNS;
constexpr int S = (ROW_BYTES + STEP - 1) / STEP;
constexpr int CHUNK_COLS = FOUR ? 32 : 16, STEP_COLS = CHUNKS * CHUNK_COLS;
constexpr int LAST_BYTES = ROW_BYTES - (S - 1) * STEP;  // of the last step
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
// Of scales: whether they come with the weights; how many chunks share one, half a step's at most;
// SPAN steps' travel together, at most 32 bytes, a sector, of each row.
constexpr bool RINGED = GROUP != 0;
constexpr int WIDTH = GROUP == 0 ? COLUMNS : GROUP;
constexpr int GC = SCALED || WIDTH >= STEP_COLS / 2 ? CHUNKS / 2 : WIDTH / CHUNK_COLS;
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
  const int* lone;  // LONE: the expert of each slot, or -1
  int count;

  DEVICE int live(int task) const {  // from ``task`` on
    if (LONE)
      while (task < count && lone[task / TILES] < 0) task += gridDim.x;
    return task;
  }
  DEVICE int next(int task) const { return live(task + gridDim.x); }
  // As the table has it: not yet within what there is. ``early``: before the launch in front ends.
  DEVICE int listed(int task, bool early) const {
    if (LONE) return task < count ? lone[task / TILES] : 0;
    const int* at = a.experts + min(task / TILES, a.last_block);
    return early ? load_past_l1(at) : *at;
  }
  DEVICE int within(int expert) const { return min(max(expert, 0), a.num_local - 1); }
  DEVICE int expert(int task) const { return within(listed(task, false)); }
  // In a place of the task's block; outside [0, R) where there is none.
  DEVICE int slot(int task, int place) const { return a.sorted[task / TILES * BN + place]; }
};

// The first feature of a tile of 16 rows; beyond FEATURES the copy engine brings zeros.
DEVICE int feature(const Place& p, int task, int mt) {
  return task % TILES * FT + (p.wm * MT + mt) * FM;
}
// Where row r of a tile lies in a box of so many features: rows of one shard after the other's.
DEVICE int box_row(int tile, int r, int features) {
  return GATED ? tile * 8 + r % 8 + r / 8 * features : tile * 16 + r;
}
// The row of scales that belongs to row r (of 16) of a tile.
DEVICE int scale_row(const Place& p, int task, int mt, int r) {
  const int f = min(feature(p, task, mt) + (GATED ? r & 7 : r), FEATURES - 1);
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

// The step that a warp asks for, and its expert, which is looked up when the task before begins.
struct Ahead {
  const Place& p;
  const Tasks& tasks;
  Walk at;
  int upcoming, expert = 0;

  DEVICE Ahead(const Place& p, const Tasks& tasks, int task)
      : p(p), tasks(tasks), at{task, p.k_begin}, upcoming(tasks.listed(task, EARLY)) {
    aim();
  }
  DEVICE bool inside() const { return at.task < tasks.count; }
  DEVICE void advance() {
    if (at.advance(p, tasks)) aim();
  }
  DEVICE void aim() {
    if (!inside()) return;
    expert = tasks.within(upcoming);
    upcoming = tasks.listed(tasks.next(at.task), EARLY);
  }
};

// The expert of a slot as kernels/ids.py has it.
DEVICE int lone_expert(const Arguments& a, int slot) {
  if (slot >= a.R) return -1;
  i64 id = ID64 ? load_past_l1((const i64*)a.ids + slot) : load_past_l1((const int*)a.ids + slot);
  if (a.map) id = id >= 0 && id < a.num_mapped ? a.map[id] : -1;
  return id >= 0 && id < a.num_local ? (int)id : -1;
}
