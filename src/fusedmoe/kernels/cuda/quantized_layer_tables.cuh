// Which slots are a block, worked out by every program from their ids: in less time than it takes to
// launch what would, and to wait for it. By experts, then in the order of slots.

constexpr u16 NONE = 0xFFFF;
constexpr int BLOCK_SLOTS = 8 * NT, MOST_MADE = MADE;
struct Tables {
  float weights[MOST_MADE];                       // of slots, where they are given
  u16 experts_of[MOST_MADE], ranks[MOST_MADE];    // of slots; in their chunk and expert
  u16 order[MOST_MADE];                           // slots, block by block
  u16 experts[MOST_MADE], begins[MOST_MADE + 2];  // of blocks
  u32 totals[32];                                 // of a warp's experts: slots, blocks << 16

  DEVICE int slot(int block, int place) const {
    const int at = begins[block] + place;
    return at < begins[block + 1] ? order[at] : -1;
  }
};
DEVICE Tables& tables();

// ``scratch``, of shared memory: how many slots each expert has in each chunk of 32, 2 bytes each, then
// where each begins. Counts are cleared before ids are there.
DEVICE void clear_counts(int slots, int experts, int threads, u8* scratch) {
  const int words = ((slots + 31) / 32 * experts + 1) / 2;
  for (int i = threadIdx.x; i < words; i += threads) ((u32*)scratch)[i] = 0;
  __syncthreads();
}
// By all THREADS: ids, and weights of picks where they are given, to tables. Returns how many blocks.
template <int THREADS, class Launch>
DEVICE int make_tables(const Launch& a, u8* scratch, const float* pick_weights = nullptr) {
  constexpr int CHUNKS = (MOST_MADE / 32 * 32 + THREADS - 1) / THREADS;  // of a warp at most
  Tables& made = tables();
  u16* const counts = (u16*)scratch;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunks = (a.R + 31) / 32;
  const int experts = a.num_local;
  int experts_of[CHUNKS];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int slot = (warp + i * (THREADS / 32)) * 32 + lane;
    experts_of[i] = lone_expert(a, slot);
    if (pick_weights && slot < a.R)
      copy4(shared_address(made.weights + slot), pick_weights + slot, true);
  }
  commit();
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int chunk = warp + i * (THREADS / 32), slot = chunk * 32 + lane, expert = experts_of[i];
    if (chunk >= chunks) break;
    const u32 alike = lanes_like(expert);
    const int rank = __popc(alike & ((1u << lane) - 1));
    if (slot < a.R) made.experts_of[slot] = (u16)expert, made.ranks[slot] = (u16)rank;
    if (expert >= 0 && rank == 0) counts[chunk * experts + expert] = (u16)__popc(alike);
  }
  __syncthreads();
  // Each thread has neighbouring experts. Counts become what precedes in earlier chunks, and in
  // earlier experts (``starts``).
  u16* const starts = counts + chunks * experts;
  const int own = (experts + THREADS - 1) / THREADS, first = min((int)threadIdx.x * own, experts);
  const int last = min(first + own, experts);
  u32 all = 0;
  for (int expert = first; expert < last; expert++) {
    constexpr int MOST_CHUNKS = MOST_MADE / 32;
    int slots = 0, here[MOST_CHUNKS];
#pragma unroll
    for (int chunk = 0; chunk < MOST_CHUNKS; chunk++)
      here[chunk] = chunk < chunks ? counts[chunk * experts + expert] : 0;
#pragma unroll
    for (int chunk = 0; chunk < MOST_CHUNKS; chunk++) {
      if (chunk < chunks) counts[chunk * experts + expert] = (u16)slots;
      slots += here[chunk];
    }
    starts[expert] = (u16)slots;
    all += slots + ((slots + BLOCK_SLOTS - 1) / BLOCK_SLOTS << 16);
  }
  u32 before = all, whole = 0;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const u32 other = (u32)from_lane((int)before, max(lane - apart, 0));
    if (lane >= apart) before += other;
  }
  if (lane == 31) made.totals[warp] = before;
  before -= all;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; i++) {
    if (i == warp) before += whole;
    whole += made.totals[i];
  }
  int start = before & 0xFFFF, block = before >> 16;
  for (int expert = first; expert < last; expert++) {
    const int slots = starts[expert];
    starts[expert] = (u16)start;
    for (int i = 0; i < slots; i += BLOCK_SLOTS, block++)
      made.experts[block] = (u16)expert, made.begins[block] = (u16)(start + i);
    start += slots;
  }
  const int blocks = (int)(whole >> 16);
  if (threadIdx.x == 0) made.begins[blocks] = (u16)whole;
  __syncthreads();
  for (int slot = threadIdx.x; slot < a.R; slot += THREADS) {
    const int expert = made.experts_of[slot];
    if (expert != NONE)
      made.order[starts[expert] + counts[slot / 32 * experts + expert] + made.ranks[slot]] = (u16)slot;
  }
  wait_groups<0>();
  show_to_products();  // to the copy engine, which writes there next
  __syncthreads();
  return blocks;
}
