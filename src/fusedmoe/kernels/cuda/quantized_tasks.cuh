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

// Of a row: CHUNKS of a step.
constexpr int CHUNKS = STEP / 16;
constexpr int LAST_BYTES = ROW_BYTES - (S - 1) * STEP;  // of the last step
// How many chunks share a scale, half a step's at most.
constexpr int GC = SCALED || WIDTH >= STEP_COLS / 2 ? CHUNKS / 2 : WIDTH / CHUNK_COLS;

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
