// A few slots on Hopper, each by itself: one GEMM whose quantized weights stream once, as they are
// stored, to any of its slots.
//
// out[slot, f] = act(x[slot / TOP_K] . w[expert(slot)] + bias). No tables: a slot reads its own id.
//
// Weights are the M side of mma.m16n8k16; of its N side the slot is the first column. A warp owns MT
// tiles of 16 weight rows (GATED: eight of gate, eight of up, so that both numbers of a feature meet
// in one thread) and a KW-th of their columns; KW warps share a tile and add up through shared
// memory. The copy engine brings rows to a ring of the warp's own, a line of each at a time; scales,
// zero points and x come beside them by cp.async. The ring never drains between tasks, and no
// barrier but the sum's joins warps. A task is (slot, WM * MT tiles of rows); tasks go round robin
// over the blocks of the grid, of which all are resident.
//
// The sum over columns may be taken in any order, so no nibble is moved: the 4 bytes that ldmatrix
// hands a thread count as the columns that the instruction expects of it, and x is paired to match.
// A group's products are summed by themselves and multiplied by the scale in fp32. What the zero
// point of int4 adds, a product of x with a constant takes away.
//
// EARLY: the launch before is the first GEMM; weights are read before it has ended. Other constants
// come from the launcher as macros; quantized_decode.py names them, and the files whose text stands
// before this one.

// A step is two beats, the last of a row one where that is enough.
constexpr int BEAT_CHUNKS = CHUNKS / 2;
constexpr bool SHORT = LAST_BYTES <= STEP / 2;
// Of a warp's rings: rows of weights, their scales, x.
constexpr int RING_BYTES = STAGES * TILE_BYTES, X_BYTES = STEP_COLS * 2;
// Sums that KW warps share: of every fourth thread, which has the first column.
constexpr int PARTS = WARPS * MT * 8;

// Weights and scales of the steps to come.
struct Weights {
  Ahead ahead;
  Spans spans;
  u32 ring, barriers;

  DEVICE void issue(int stage) {
    if (!ahead.inside()) return;
    const Place& p = ahead.p;
    const int k = ahead.at.k;
    if (p.lane == 0)
      copy_tile(ring + stage * TILE_BYTES, ahead.tasks.a.tiles, k * STEP,
                feature(p, ahead.at.task, 0), ahead.expert, barriers + stage * 8, TILE_BYTES);
    spans.issue(ahead);
    ahead.advance();
  }
};

// x of the steps to come: a task has too few of them to wait for each.
struct Row {
  const Place& p;
  const Tasks& tasks;
  u32 ring;
  Walk at;

  DEVICE void issue(int stage) {
    if (at.task >= tasks.count) return;
    const int own = p.lane * 8, column = at.k * STEP_COLS + own;
    const i64 row = at.task / TILES / TOP_K * tasks.a.stride_x;
    if (own < STEP_COLS)
      copy16(ring + stage * X_BYTES + own * 2, tasks.a.x + row + column, column < COLUMNS);
    at.advance(p, tasks);
  }
  DEVICE void take(u32 (&to)[XR], int stage, int chunk) const {
    u32 own[XR];
    load_shared(own, ring + stage * X_BYTES + (chunk * CHUNK_COLS + p.t * 2 * XR) * 2);
    pair_up(to, own);
  }
};

// acc += scale * (part + what zero points take away), for one group.
DEVICE void fold(Accumulators& acc, const Accumulators& part, const float (&sums)[4],
                 const Scales& scales, int group) {
#pragma unroll
  for (int i = 0; i < MT * 2; i++) {
    const int mt = i / 2, half = i % 2;
    const float factor = scales.factor(mt, half, group), zero = scales.zero(mt, half, group);
#pragma unroll
    for (int j = 2 * half; j < 2 * half + 2; j++) {
      float value = part[mt][0][j];
      if (ELEMENT == INT4) value = fmaf(-zero, sums[j], value);
      acc[mt][0][j] = fmaf(factor, value, acc[mt][0][j]);
    }
  }
}

// The products of a beat: this warp's rows in the ring with x.
DEVICE void multiply(Accumulators& acc, const Place& p, u32 tile, const Row& row, int stage,
                     int beat, const Scales& scales, int group) {
  Accumulators part;
  float sums[4];  // of x
  u32 w[MT][4];   // of both halves of the rows, two chunks
#pragma unroll
  for (int c = beat * BEAT_CHUNKS; c < (beat + 1) * BEAT_CHUNKS; c++) {
    if (c % 2 == 0) {
      const u32 piece = ((c + (p.lane >> 4)) ^ (p.lane & 7)) << 4;
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
        ldmatrix(w[mt], tile + box_row(mt, p.lane & 15, MT * FM) * STEP + piece);
    }
    if (FOLD && c % GC == 0) {
      sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
      clear(part);
    }
    u32 x[XR];
    row.take(x, stage, c);
    if (ELEMENT == INT4) {
      // One, as numbers() has it in even and odd registers.
      const u32 even = 0x00010001u, odd = 0x00100010u;
      mma(sums, even, even, odd, odd, x[0], x[1]);
      mma(sums, even, even, odd, odd, x[XR - 2], x[XR - 1]);
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      u32 v[2][XR];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        numbers(v[half], w[mt][c % 2 * 2 + half]);
        if (SCALED) {
          const int own = group + c * 2 + (p.t >> 1);
          scale_numbers(v[half], shared_u8(scales.at[mt][half] + own));
        }
      }
      float(&sum)[4] = FOLD ? part[mt][0] : acc[mt][0];
#pragma unroll
      for (int i = 0; i < XR; i += 2)
        mma(sum, v[0][i], v[1][i], v[0][i + 1], v[1][i + 1], x[i], x[i + 1]);
    }
    if (FOLD && (c + 1) % GC == 0) fold(acc, part, sums, scales, group + c * CHUNK_COLS / WIDTH);
  }
}

DEVICE void finish(const Place& p, const Arguments& a, int task, const Ends& ends,
                   const Accumulators& acc, float4* parts) {
  add_up<8>(p, acc, parts, p.g, p.t == 0, [&](int mt, int n, const float (&v)[4]) {
    store(p, a, task, ends, mt, n, v);
  });
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM)
quantized_lone(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  const Place p = find_place();
  u8* const spans = memory + WARPS * RING_BYTES;
  u8* const rings_of_x = spans + WARPS * SCALES_BYTES;
  float4* const parts = (float4*)(rings_of_x + WARPS * STAGES * X_BYTES);
  u8* const barriers = (u8*)(parts + (KW > 1 ? 2 * PARTS : 0));
  int* const experts = (int*)(barriers + WARPS * STAGES * 8);
  const u32 own_barriers = shared_address(barriers) + p.warp * STAGES * 8;
  if (p.lane < STAGES) begin_barrier(own_barriers + p.lane * 8, 1);
  barriers_have_begun();
  if (!EARLY) {
    wait_for_previous();
    let_next_begin();
  }
  if (threadIdx.x < 32) experts[threadIdx.x] = lone_expert(a, threadIdx.x);
  __syncthreads();
  const Tasks tasks{a, experts, a.R * TILES};
  int task = tasks.live(blockIdx.x);

  const u32 ring = shared_address(memory) + p.warp * RING_BYTES;
  const u32 own_spans = shared_address(spans) + p.warp * SCALES_BYTES;
  Weights weights{Ahead(p, tasks, task), Spans{own_spans}, ring, own_barriers};
  Row row{p, tasks, shared_address(rings_of_x) + p.warp * STAGES * X_BYTES, Walk{task, p.k_begin}};
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; stage++) {
    weights.issue(stage);
    commit();
  }
  if (EARLY) {
    wait_for_previous();
    let_next_begin();
  }
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; stage++) {
    row.issue(stage);
    commit();
  }

  Accumulators acc;
  Scales scales{own_spans};
  Ends ends;
  int stage = 0, phase = 0, parity = 0;
  for (; task < tasks.count; task = tasks.next(task)) {
    clear(acc);
    ends.load(p, tasks, task);
    for (int k = p.k_begin; k < p.k_end; k++) {
      wait_barrier(own_barriers + stage * 8, phase);
      wait_groups<STAGES - 2>();
      __syncwarp();
      const int emptied = stage == 0 ? STAGES - 1 : stage - 1;  // by the step before
      weights.issue(emptied);
      row.issue(emptied);
      commit();
      scales.step(p, tasks, task, k);
#pragma unroll
      for (int beat = 0; beat < 2; beat++) {
        if (SHORT && beat > 0 && k == S - 1) break;
        multiply(acc, p, ring + stage * TILE_BYTES, row, stage, beat, scales, first_group(k));
      }
      stage = turn(stage, STAGES);
      phase ^= stage == 0;
    }
    // Two buffers in turns: whoever writes one again has met the others at the barrier between.
    finish(p, a, task, ends, acc, parts + parity);
    parity ^= PARTS;
  }
  wait_groups<0>();
}
