// kernels/align.py's tables of few slots, by one program.
//
// A group has a bit for each of its slots, so what comes before a slot is counted whatever the order
// in which threads set them. The table is made in shared memory, where padding lies before there are
// ids, and leaves it in one piece. Constants come from the launcher as macros; align_few.py names them.

struct Arguments {
  const void* ids;
  const int* map;
  int *sorted, *experts, *num_post;
  int R, P, B, num_mapped, num_local;
};

// Of a group: its words of bits, one more than needed so that threads meet in no bank.
constexpr int PITCH = WORDS + 1, EACH = (WORDS * 32 + WIDTH - 1) / WIDTH;
constexpr int WARPS = WIDTH / 32, GROUP_WARPS = (GROUPS + 31) / 32;

DEVICE int blocks_of(int slots) { return (slots + BLOCK - 1) / BLOCK; }

extern "C" __global__ void __launch_bounds__(WIDTH, 1) align_few(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  int* const table = (int*)memory;                // MOST_USED
  int* const starts = table + MOST_USED;          // of groups
  int* const of_warps = starts + GROUPS;          // blocks of their groups
  u32* const bits = (u32*)(of_warps + GROUP_WARPS);
  u16* const before = (u16*)(bits + GROUPS * PITCH);  // how many bits a group has in earlier words
  const int own = threadIdx.x, lane = own & 31, warp = own >> 5;
  for (int i = own; i < GROUPS * PITCH; i += WIDTH) bits[i] = 0;
  for (int i = own; i < MOST_USED; i += WIDTH) table[i] = a.R;
  __syncthreads();
  wait_for_previous();
  let_next_begin();
  int groups[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) groups[i] = lone_expert(a, i * WIDTH + own);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int slot = i * WIDTH + own;
    if (groups[i] >= 0) set_bits(bits + groups[i] * PITCH + slot / 32, 1u << slot % 32);
  }
  __syncthreads();
  int used = 0;  // blocks of groups before those of this round
#pragma unroll
  for (int first = 0; first < GROUPS; first += WIDTH) {
    const int group = first + own;
    int count = 0;
    for (int i = 0; i < (group < GROUPS ? WORDS : 0); i++) {
      before[group * PITCH + i] = (u16)count;
      count += __popc(bits[group * PITCH + i]);
    }
    int start = blocks_of(count);
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
      const int other = from_lane(start, max(lane - apart, 0));
      if (lane >= apart) start += other;
    }
    if (lane == 31 && group / 32 < GROUP_WARPS) of_warps[group / 32] = start;
    __syncthreads();
    start += used - blocks_of(count);
#pragma unroll
    for (int i = 0; i < WARPS && first / 32 + i < GROUP_WARPS; i++) {
      const int there = of_warps[first / 32 + i];
      if (i < warp) start += there;
      used += there;
    }
    if (group >= GROUPS) continue;
    starts[group] = start * BLOCK;
    for (int i = 0; i < blocks_of(count); i++) a.experts[start + i] = group;
  }
  for (int i = used + own; i < a.B; i += WIDTH) a.experts[i] = -1;
  if (own == 0) *a.num_post = used * BLOCK;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (groups[i] < 0) continue;
    const int slot = i * WIDTH + own, at = groups[i] * PITCH + slot / 32;
    table[starts[groups[i]] + before[at] + __popc(bits[at] & (1u << slot % 32) - 1)] = slot;
  }
  __syncthreads();
  const int whole = min(a.P, MOST_USED) / 4;
  for (int i = own; i < whole; i += WIDTH) ((uint4*)a.sorted)[i] = ((const uint4*)table)[i];
  for (int i = whole * 4 + own; i < a.P; i += WIDTH) a.sorted[i] = i < MOST_USED ? table[i] : a.R;
}
