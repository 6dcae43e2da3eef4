// Blocks of slots on Hopper: one GEMM whose quantized weights stream once, as they are stored.
//
// out[slot, f] = act(x[slot / TOP_K] . w[expert(slot)] + bias), blocks of BN slots from tables.
//
// Weights are the M side of WGMMA and come from registers, slots the N side, from shared memory. A
// task is (block of slots, FT features); WM warps of 16 weight rows each (GATED: eight of gate, eight
// of up, so that both numbers of a feature meet in one thread) multiply, four of them to a WGMMA.
// Behind them one warp asks the copy engine for weights, a line of every row at a time, and one
// brings x by cp.async. Scales and zero points come to each multiplying warp by cp.async, too. The
// ring never drains between tasks, which go round robin over the blocks of the grid, all of them
// resident.
//
// The sum over columns may be taken in any order, so no nibble is moved: the 4 bytes that ldmatrix
// hands a thread count as the columns that the instruction expects of it. x comes in that order
// (kernels/align_pair.py), and the first GEMM writes it for the second. A group's products are
// summed by themselves and multiplied by the scale in fp32.
//
// EARLY: the launch before is the first GEMM; weights and tables are read before it has ended. The
// launch that wrote the tables has, because the first GEMM waits for it before it lets this begin.
// Other constants come from the launcher as macros; quantized_decode.py names them, and the files
// whose text stands before this one.

// UNITS of a step, GC chunks each, are summed by themselves; LIVE of them are in registers.
constexpr int UNITS = CHUNKS / GC, LIVE = GC == 1 ? 4 : 2;
// Of x: a chunk is XR matrices of BN slots and 8 columns, and 16 bytes that keep chunks of the same
// place in different banks.
constexpr int MATRIX_BYTES = BN * 16, X_CHUNK_BYTES = XR * MATRIX_BYTES + 16;
constexpr int X_STEP_BYTES = CHUNKS * X_CHUNK_BYTES;
// Pairs of chunks in the last step of a row, whole units.
constexpr int UNIT_PAIRS = GC == 4 ? 2 : 1;
constexpr int LAST_PAIRS = (LAST_BYTES + 32 * UNIT_PAIRS - 1) / (32 * UNIT_PAIRS) * UNIT_PAIRS;
constexpr int STEP_TILE_BYTES = WM * TILE_BYTES;
// Whether a task is over before what its end needs has come, if that is asked for at its beginning.
constexpr bool BRIEF = S <= 4;
constexpr int FILLERS = 33;  // threads that fill a place of the ring

struct Ring {
  u32 weights, x, full, empty;

  DEVICE u32 full_at(int stage) const { return full + stage * 8; }
  DEVICE u32 empty_at(int stage) const { return empty + stage * 8; }
};

typedef float Products[NT * 4];

// acc += scale * part, for one unit of a step.
DEVICE void fold(Accumulators& acc, const Products& part, const Scales& scales, int group) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float factor = scales.factor(0, half, group);
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = half * 2; i < half * 2 + 2; i++)
        acc[0][n][i] = fmaf(factor, part[n * 4 + i], acc[0][n][i]);
    }
  }
}

// The numbers of a word of a row, less its zero point.
DEVICE void row_numbers(u32 (&v)[XR], u32 word, const Place& p, const Scales& scales, int half,
                        int group) {
  numbers(v, word);
  if (ELEMENT == INT4) {
    const u32 zero = ZERO ? shared_u8(scales.zeros[0][half] + group) * 0x00010001u : 0x00080008u;
#pragma unroll
    for (int i = 0; i < XR; i++) v[i] = minus2(v[i], i % 2 ? zero << 4 : zero);
  }
  if (SCALED) scale_numbers(v, shared_u8(scales.at[0][half] + group + (p.t >> 1)));
}

// The products of a step's first PAIRS pairs of chunks. Numbers of a pair are made while those of the
// pair before are multiplied.
template <int PAIRS>
DEVICE void multiply(Accumulators& acc, const Place& p, u32 tile, u32 x, const Scales& scales,
                     int group) {
  const u32 row = tile + box_row(p.wm, p.lane & 15, FT) * STEP;
  const u64 matrices = (u64)(128 >> 4) << 32 | ((from_first_thread((int)x) >> 4) + (BN << 16));
  Products part[LIVE];
  u32 a[2][2][2][XR];
#pragma unroll
  for (int q = 0; q <= PAIRS; q++) {
    if (q < PAIRS) {
      u32 w[4];
      ldmatrix(w, row + (((q * 2 + (p.lane >> 4)) ^ (p.lane & 7)) << 4));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int chunk = q * 2 + i / 2;
        row_numbers(a[q % 2][i / 2][i % 2], w[i], p, scales, i % 2,
                    group + chunk * CHUNK_COLS / WIDTH);
      }
      begin_products();
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int chunk = q * 2 + c;
        float(&sum)[NT * 4] = FOLD ? part[chunk / GC % LIVE] : (float(&)[NT * 4])acc;
        u32(&v)[2][XR] = a[q % 2][c];
#pragma unroll
        for (int i = 0; i < XR; i += 2)
          products<BN>(sum, v[0][i], v[1][i], v[0][i + 1], v[1][i + 1], matrices,
                       chunk * X_CHUNK_BYTES + i * MATRIX_BYTES,
                       !FOLD || chunk % GC != 0 || i != 0);
      }
      end_products();
    }
    if (q == 0) continue;
    if (q < PAIRS)
      wait_products<1>();
    else
      wait_products<0>();
#pragma unroll
    for (int i = 0; i < 4 * XR; i++) hold(a[(q - 1) % 2][i / XR / 2][i / XR % 2][i % XR]);
#pragma unroll
    for (int chunk = q * 2 - 2; chunk < q * 2 && FOLD; chunk++) {
      if ((chunk + 1) % GC != 0) continue;
      Products& own = part[chunk / GC % LIVE];
#pragma unroll
      for (int i = 0; i < NT * 4; i++) hold(own[i]);
      fold(acc, own, scales, group + chunk * CHUNK_COLS / WIDTH);
    }
  }
#pragma unroll
  for (int i = 0; i < NT * 4 && !FOLD; i++) hold(acc[0][i / 4][i % 4]);
}

DEVICE void bring_weights(const Place& p, const Tasks& tasks, const Ring& ring) {
  Turns turns;
  for (Ahead ahead(p, tasks, blockIdx.x); ahead.inside(); ahead.advance(), turns.next()) {
    wait_barrier(ring.empty_at(turns.stage), turns.phase ^ 1);
    if (p.lane == 0)
      copy_tile(ring.weights + turns.stage * STEP_TILE_BYTES, tasks.a.tiles, ahead.at.k * STEP,
                ahead.at.task % TILES * FT, ahead.expert, ring.full_at(turns.stage),
                STEP_TILE_BYTES);
    __syncwarp();
  }
}

// x of the steps to come, paired already: a thread copies 16 bytes, eight columns of a slot that go to
// one matrix, of every chunk of eight slots. Slots are asked for a task ahead; places without one
// stay as they are: nobody reads their sums.
struct Bringer {
  const Place& p;
  const Tasks& tasks;
  Walk at;
  int upcoming[NT];
  const u16* from[NT];

  DEVICE void ask(int task) {
#pragma unroll
    for (int n = 0; n < NT; n++)
      upcoming[n] = task < tasks.count ? tasks.slot(task, n * 8 + (p.lane & 7)) : -1;
  }
  DEVICE void find() {
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const int slot = upcoming[n];
      const bool is = slot >= 0 && slot < tasks.a.R;
      from[n] = is ? tasks.a.x + (i64)(slot / TOP_K) * tasks.a.stride_x + p.lane / 8 * 8 : nullptr;
    }
    ask(tasks.next(at.task));
  }
  DEVICE void issue(u32 x) {
    constexpr int AT_ONCE = 4 / XR;  // chunks
    const int matrix = p.lane / 8 % XR, first = p.lane / 8 / XR;
    const u32 to = x + first * X_CHUNK_BYTES + matrix * MATRIX_BYTES + (p.lane & 7) * 16;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (!from[n]) continue;
      const u16* own = from[n] + at.k * STEP_COLS;
#pragma unroll
      for (int c = 0; c < CHUNKS; c += AT_ONCE)
        copy16(to + c * X_CHUNK_BYTES + n * 128, own + c * CHUNK_COLS,
               at.k * STEP_COLS + (first + c) * CHUNK_COLS < COLUMNS);
    }
    if (at.advance(p, tasks) && at.task < tasks.count) find();
  }
};

DEVICE void bring_x(const Place& p, const Tasks& tasks, const Ring& ring) {
  Bringer own{p, tasks, Walk{(int)blockIdx.x, 0}};
  Turns turns;
  own.ask(blockIdx.x);
  own.find();
  for (; own.at.task < tasks.count; turns.next()) {
    wait_barrier(ring.empty_at(turns.stage), turns.phase ^ 1);
    const u32 full = ring.full_at(turns.stage);
    own.issue(ring.x + turns.stage * X_STEP_BYTES);
    arrive_with_copies(full);
  }
}

DEVICE void ask_for_scales(Spans& spans, Ahead& ahead) {
  if (ahead.inside()) {
    spans.issue(ahead);
    ahead.advance();
  }
  commit();
}

DEVICE void consume(const Place& p, const Tasks& tasks, const Ring& ring, u32 own_spans) {
  Ahead ahead(p, tasks, blockIdx.x);
  Spans spans{own_spans};
#pragma unroll 1
  for (int i = 0; i < STAGES - 1 && RINGED; i++) ask_for_scales(spans, ahead);
  Accumulators acc;
  Scales scales{own_spans};
  Ends ends, upcoming;
  Turns turns;
  if (BRIEF && blockIdx.x < tasks.count) upcoming.load(p, tasks, blockIdx.x);
  for (int task = blockIdx.x; task < tasks.count; task = tasks.next(task)) {
    clear(acc);
    const int next = tasks.next(task);
    if (BRIEF) ends = upcoming;
    if (!BRIEF)
      ends.load(p, tasks, task);
    else if (next < tasks.count)
      upcoming.load(p, tasks, next);
    for (int k = 0; k < S; k++, turns.next()) {
      if (RINGED) {
        wait_groups<STAGES - 2>();
        __syncwarp();
        ask_for_scales(spans, ahead);
        scales.step(p, tasks, task, k);
      }
      wait_barrier(ring.full_at(turns.stage), turns.phase);
      show_to_products();
      const u32 tile = ring.weights + turns.stage * STEP_TILE_BYTES;
      const u32 x = ring.x + turns.stage * X_STEP_BYTES;
      if (LAST_PAIRS < CHUNKS / 2 && k == S - 1)
        multiply<LAST_PAIRS>(acc, p, tile, x, scales, first_group(k));
      else
        multiply<CHUNKS / 2>(acc, p, tile, x, scales, first_group(k));
      __syncwarp();
      if (p.lane == 0) arrive(ring.empty_at(turns.stage));
    }
#pragma unroll
    for (int n = 0; n < NT; n++) store(p, tasks.a, task, ends, 0, n, acc[0][n]);
  }
  if (RINGED) wait_groups<0>();
}

extern "C" __global__ void __launch_bounds__((WM + 2) * 32, PER_SM)
quantized_stream(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  const Place p = find_place();
  u8* const x = memory + STAGES * STEP_TILE_BYTES;
  u8* const spans = x + STAGES * X_STEP_BYTES;
  u8* const barriers = spans + WM * SCALES_BYTES;
  const Ring ring{shared_address(memory), shared_address(x), shared_address(barriers),
                  shared_address(barriers) + STAGES * 8};
  if (threadIdx.x < STAGES) {
    begin_barrier(ring.full_at(threadIdx.x), FILLERS);
    begin_barrier(ring.empty_at(threadIdx.x), WM);
  }
  barriers_have_begun();
  __syncthreads();
  const bool weights = p.warp == WM;
  if (!EARLY) {
    if (a.guess && weights && p.lane == 0) {
      // While tables are made: the first steps, as they are if every expert has one block.
      const int expert = blockIdx.x / TILES;
      for (int k = 0; k < min(STAGES, S) && expert < a.num_local; k++)
        prefetch_tile(a.tiles, k * STEP, blockIdx.x % TILES * FT, expert);
    }
    wait_for_previous();
    let_next_begin();
  }
  const Tasks tasks{a, nullptr, load_past_l1(a.num_post) / BN * TILES};
  if (weights) {
    bring_weights(p, tasks, ring);
    return;
  }
  if (EARLY) {
    wait_for_previous();
    let_next_begin();
  }
  if (p.warp > WM)
    bring_x(p, tasks, ring);
  else
    consume(p, tasks, ring, shared_address(spans) + p.warp * SCALES_BYTES);
}
