}  // namespace second

// A few slots per expert on Hopper: both GEMMs of quantized_rows.cu, what groups their slots and the
// weighted sum over picks in one launch.
//
// out[t] = sum over picks of weight * (w2[expert] . act + bias2), act = act(w1[expert] . x[t] + bias1).
// A block on every multiprocessor, all resident (a cooperative launch): each works out the blocks of
// slots for itself, has neighbouring items of the first GEMM, then of the second, then columns of the
// sum; all blocks meet in between. The ring of weights goes on from w1 to w2, so that w2 is there when
// act is.
//
// The meeting's word stays as it is for the next launch. Two launches never meet at it: each block
// has a multiprocessor to itself, so that a launch that another stream begins has not all of its
// blocks before the last one of this has ended.

__device__ u32 meeting;

struct Arguments {
  first::Arguments first;
  second::Arguments second;
  const float* pick_weights;
  void* out;
  i64 stride_out;  // elements
  int tokens;
};

constexpr int MOST_WARPS = first::WARPS > second::WARPS ? first::WARPS : second::WARPS;
constexpr int THREADS = MOST_WARPS * 32;  // that multiply
constexpr int ALL_THREADS = THREADS + BRINGERS * 32;
DEVICE constexpr int most(int a, int b) { return a > b ? a : b; }
// Where things lie in shared memory: rings (before them, what tables are made with), sums that warps
// exchange, sums of x, barriers, tables.
constexpr int EXCHANGED_AT = most(most(first::RING_BYTES, second::RING_BYTES), SCRATCH);
constexpr int OF_X_AT = EXCHANGED_AT + most(first::EXCHANGE_BYTES, second::EXCHANGE_BYTES);
constexpr int BARRIERS_AT = OF_X_AT + most(first::SUM_BYTES, second::SUM_BYTES);
constexpr int SECOND_BARRIERS_AT = BARRIERS_AT + (first::BARRIER_BYTES + 7) / 8 * 8;
constexpr int TABLES_AT = (SECOND_BARRIERS_AT + second::BARRIER_BYTES + 15) / 16 * 16;
DEVICE Tables& tables() {
  DYNAMIC_SHARED(memory);
  return *(Tables*)(memory + TABLES_AT);
}

// The second ring's first place: where the first one's next would be, so that they are free in order.
DEVICE int begin_behind(int stretches) {
  const int items = first::first_item(stretches, blockIdx.x + 1) - first::first_item(stretches, blockIdx.x);
  const int stage = items % (first::RING_BYTES / first::UNIT_BYTES);
  const int place = (stage * first::UNIT_BYTES + second::UNIT_BYTES - 1) / second::UNIT_BYTES;
  return place < second::RING_BYTES / second::UNIT_BYTES ? place : 0;
}

// For places of the second ring: until those of the first that lie there are free.
struct Room {
  static constexpr int STAGES_BEFORE = first::RING_BYTES / first::UNIT_BYTES;
  const first::Ring& ring;
  first::Turns turns;
  int begin, free = 1;  // the stage of ``turns`` when this began; behind it, how many are free

  DEVICE Room(const first::Ring& ring, first::Turns turns)
      : ring(ring), turns(turns), begin(turns.stage) {}
  DEVICE void wait_for(int place) {
    if (free == STAGES_BEFORE) return;
    const int low = place * second::UNIT_BYTES / first::UNIT_BYTES;
    const int high = ((place + 1) * second::UNIT_BYTES - 1) / first::UNIT_BYTES;
    for (int own = low; own <= high && own < STAGES_BEFORE; own++) {
      const int wanted = (own < begin ? own + STAGES_BEFORE : own) - begin + 1;
      while (free < wanted) {
        turns.next();
        wait_barrier(ring.empty_at(turns.stage), turns.phase ^ 1);
        free++;
      }
    }
  }
};

// Past it, what any of the blocks' warps that multiply had written before is seen.
DEVICE void meet_all() {
  meet<THREADS>(1);
  if (threadIdx.x == 0) meet_grid(&meeting);
  meet<THREADS>(1);
}

// Four columns of a token for each thread, a warp's side by side.
DEVICE void sum_picks(const Arguments& a) {
  constexpr int PICKS = FIRST_TOP_K, ROWS = SECOND_PARTS, WIDTH = SECOND_FEATURES, QUADS = WIDTH / 4;
  const Tables& made = tables();
  const int warps = THREADS / 32, begin = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * 32;
  for (int i = begin + threadIdx.x % 32; i < a.tokens * QUADS; i += warps * gridDim.x * 32) {
    const int token = i / QUADS, column = i % QUADS * 4;
    const float* from = (const float*)a.second.out + (i64)token * (PICKS * ROWS) * WIDTH + column;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int pick = 0; pick < PICKS; pick++) {
      const int slot = token * PICKS + pick;
      const bool live = made.experts_of[slot] != NONE;
      const float weight = a.pick_weights ? made.weights[slot] : 1.0f;
      float own[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        const uint4 v = load_past_l1(from + (pick * ROWS + row) * WIDTH, live);
        own[0] += as_float(v.x), own[1] += as_float(v.y);
        own[2] += as_float(v.z), own[3] += as_float(v.w);
      }
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (live) sum[j] = fmaf(weight, own[j], sum[j]);
    }
    u32 two[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
      two[j] = float_bf16(sum[2 * j]) | (u32)float_bf16(sum[2 * j + 1]) << 16;
    *(uint2*)((u16*)a.out + token * a.stride_out + column) = make_uint2(two[0], two[1]);
  }
}

extern "C" __global__ void __maxnreg__(BOUND)
quantized_layer(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  const u32 at = shared_address(memory);
  const first::Ring first_ring(at, at + BARRIERS_AT);
  second::Ring second_ring(at, at + SECOND_BARRIERS_AT);
  float4* const sums = (float4*)(memory + EXCHANGED_AT);
  const first::Parts first_parts(sums, first_ring.behind());
  const second::Parts second_parts(sums, second_ring.behind());
  first::begin_barriers(first_ring, first_parts);
  second::begin_barriers(second_ring, second_parts);
  barriers_have_begun();
  if (threadIdx.x == 0) {
    if (first::BOXES) prefetch_map(a.first.boxes);
    if (second::BOXES) prefetch_map(a.second.boxes);
    if (FIRST_SCALE_BOX) prefetch_map(a.first.scale_boxes);
    if (SECOND_SCALE_BOX) prefetch_map(a.second.scale_boxes);
  }
  clear_counts(a.first.R, a.first.num_local, ALL_THREADS, memory);
  wait_for_previous();
  let_next_begin();
  const int blocks = make_tables<ALL_THREADS>(a.first, memory, a.pick_weights);
  const int warp = threadIdx.x >> 5;
  const int of_first = blocks * FIRST_PARTS, of_second = blocks * SECOND_PARTS;
  second_ring.first = begin_behind(of_first);
  if (warp >= MOST_WARPS) {
    if (REGISTERS) give_registers<BRINGER_REGISTERS>();
    if (warp > MOST_WARPS) return;
    const first::Turns turns = first::bring(a.first, of_first, first_ring, first::Anywhere());
    second::bring(a.second, of_second, second_ring, Room(first_ring, turns));
    return;
  }
  if (REGISTERS) take_registers<REGISTERS>();
  u8* const of_x = memory + OF_X_AT;
  if (warp < first::WARPS)
    first::consume(first::find_place(true), a.first, of_first, first_ring, first_parts, of_x, [] {});
  if (warp < second::WARPS)
    second::consume(second::find_place(true), a.second, of_second, second_ring, second_parts, of_x,
                    [] { meet_all(); });
  else
    meet_all();
  meet_all();
  sum_picks(a);
}
