// MADE: which slots are a block every program works out from their ids, which takes less than to
// launch what would. By experts, then in the order of slots.
constexpr int MOST_MADE = 32, BLOCK_SLOTS = 8 * NT;
constexpr u16 NONE = 0xFFFF;
struct Tables {
  u16 experts_of[MOST_MADE], leaders[MOST_MADE];   // of a slot; of those that are a block's first
  u16 experts[MOST_MADE], places[MOST_MADE * BLOCK_SLOTS];  // of a block
  int blocks;

  DEVICE int slot(int block, int place) const { return (short)places[block * BLOCK_SLOTS + place]; }
};
DEVICE Tables& tables();
// Eight of a row of numbers.
struct Eight {
  u16 of[8];
  DEVICE Eight(const u16* from) {
    const uint4 v = *(const uint4*)from;
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++) of[i] = (u16)(words[i / 2] >> i % 2 * 16);
  }
};
template <int THREADS, class Launch>
DEVICE int make_tables(const Launch& a) {
  Tables& made = tables();
  const int own = threadIdx.x, expert = own < MOST_MADE ? lone_expert(a, own) : -1;
  for (int i = own; i < MOST_MADE * BLOCK_SLOTS / 2; i += THREADS) ((u32*)made.places)[i] = ~0u;
  if (own < MOST_MADE) made.experts_of[own] = (u16)expert;
  __syncthreads();
  int rank = 0, blocks = 0, before = 0;
  for (int i = 0; own < MOST_MADE && i < a.R; i += 8) {
    const Eight eight(made.experts_of + i);
#pragma unroll
    for (int j = 0; j < 8; j++) rank += i + j < own && eight.of[j] == (u16)expert;
  }
  const bool leads = expert >= 0 && rank % BLOCK_SLOTS == 0;
  if (own < MOST_MADE) made.leaders[own] = leads ? (u16)expert : NONE;
  __syncthreads();
  for (int i = 0; own < MOST_MADE && i < a.R; i += 8) {
    const Eight eight(made.leaders + i);
#pragma unroll
    for (int j = 0; j < 8; j++) blocks += eight.of[j] != NONE, before += eight.of[j] < (u16)expert;
  }
  if (expert >= 0) {
    made.places[before * BLOCK_SLOTS + rank] = (u16)own;
    if (leads) made.experts[before + rank / BLOCK_SLOTS] = (u16)expert;
  }
  if (own == 0) made.blocks = blocks;
  __syncthreads();
  return made.blocks;
}
