// Few slots per expert on Hopper: one GEMM whose quantized weights stream once, as they are stored.
//
// out[slot, f] = act(x[slot / TOP_K] . w[expert(slot)] + bias). Blocks of slots come from tables, or
// every slot is one (LONE).
//
// Weights are the M side of mma.m16n8k16, slots the N side. A warp owns MT tiles of 16 weight rows
// (GATED: eight of gate, eight of up, so that both numbers of a feature meet in one thread) and
// every KW-th step of STEP bytes of each of them; KW warps share a tile and add up through shared
// memory. Rows come by cp.async into a ring of the warp's own, scales and zero points with them;
// the ring never drains between tasks, and no barrier but the sum's joins warps. A task is (block
// of slots, WM * MT tiles of rows); tasks go round robin over the CTAs.
//
// The sum over columns may be taken in any order, so no nibble is moved: the 4 bytes that ldmatrix
// hands a thread count as the columns that the instruction expects of it, and x, read through L1,
// is paired to match. A group's products are summed by themselves and multiplied by the scale in
// fp32. int4 becomes 128 + q in one lop3; what that and the zero point add, a product of x with a
// constant takes away. e2m1 and e4m3 keep their exponent bits: they are short of 2^-126 and 2^-120,
// which x (times 2^64) and the epilogue make up for. Groups of 16 (nvfp4) scale the weights, which
// is exact.
//
// EARLY: the launch before is the first GEMM; weights and tables are read before it has ended.
// Compile-time constants come from the launcher as macros; see kernels/cuda/quantized_decode.py.

struct Arguments {
  const u8* weights;
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
  int R, num_mapped, num_local, last_block;
  float limit, alpha, beta;
};

constexpr int INT4 = 0, E2M1 = 1, INT8 = 2, E4M3 = 3;
constexpr bool FOUR = ELEMENT <= E2M1;
constexpr int BEAT_COLS = FOUR ? 128 : 64;  // 64 bytes of a row
constexpr int BEATS = STEP / 64;
constexpr int STEP_COLS = BEAT_COLS * BEATS;
constexpr int CHUNK_COLS = FOUR ? 32 : 16;  // 16 bytes of a row
constexpr int XR = FOUR ? 4 : 2;            // registers of x per chunk
constexpr bool IN_REG = ELEMENT == E2M1 && GROUP == 16;
constexpr bool RINGED = GROUP != 0;  // scales come with the weights
constexpr bool FOLD = RINGED || ELEMENT == INT4;
constexpr int SPS = GROUP == 0 || GROUP >= STEP_COLS ? 1 : STEP_COLS / GROUP;
constexpr int GC = IN_REG || GROUP == 0 || GROUP >= BEAT_COLS ? 4 : GROUP / CHUNK_COLS;
constexpr bool RAISED = (ELEMENT == E2M1 && !IN_REG) || ELEMENT == E4M3;
constexpr int FM = GATED ? 8 : 16;  // features of an m16 tile
constexpr int FT = WM * MT * FM;    // of a task
constexpr int TILES = (FEATURES + FT - 1) / FT;
constexpr int ROW_BYTES = FOUR ? COLUMNS / 2 : COLUMNS;
constexpr int S = (ROW_BYTES + STEP - 1) / STEP;
constexpr int SB = SCALE_BYTES;
constexpr bool CUT = ROW_BYTES % STEP != 0;  // the last step is not whole
constexpr int SHARD_STEP = INTERLEAVED ? 1 : FEATURES, ROW_STEP = INTERLEAVED ? 2 : 1;
constexpr i64 EXPERT_BYTES = (i64)(GATED ? 2 : 1) * FEATURES * ROW_BYTES;
constexpr int ROW_STRIDE = ROW_STEP * ROW_BYTES;
constexpr int HALF_OFFSET = GATED ? SHARD_STEP * ROW_BYTES : 8 * ROW_STRIDE;
constexpr int WARPS = KW * WM;
constexpr int BN = 8 * NT;
// Scales and zero points of SPAN steps travel together: 32 bytes, a sector, of each row.
constexpr int PITCH = 36;  // no two of eight rows begin in one bank
constexpr int SPAN_BYTES = RINGED ? MT * 16 * PITCH : 0;
constexpr int TILE_BYTES = MT * 16 * STEP;
constexpr int RING_BYTES = STAGES * TILE_BYTES + SPANS * SPAN_BYTES * (ZERO ? 2 : 1);
constexpr int CPR = STEP / 16;  // 16-byte pieces of a row
constexpr int PIECES = MT * CPR / 2;  // per lane and step

DEVICE float stored_scale(u32 address) {
  if (SCALE == 0) return as_float(shared_u32(address));
  if (SCALE == 1) return as_float(shared_u16(address) << 16);
  if (SCALE == 2) return half_float((u16)shared_u16(address));
  return as_float(shared_u8(address) << 23);
}
DEVICE float global_scale(const u8* at, i64 index) {
  if (SCALE == 0) return ((const float*)at)[index];
  if (SCALE == 1) return bf16_float(((const u16*)at)[index]);
  if (SCALE == 2) return half_float(((const u16*)at)[index]);
  return as_float((u32)at[index] << 23);
}
DEVICE float bias_at(const void* bias, i64 index) {
  if (BIAS == 1) return ((const float*)bias)[index];
  if (BIAS == 2) return bf16_float(((const u16*)bias)[index]);
  return half_float(((const u16*)bias)[index]);
}

// The epilogue's formulas, as kernels/triton/activation.py has them.
DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
DEVICE float least(float x, float limit) { return x > limit ? limit : x; }       // NaN stays
DEVICE float within(float x, float limit) { return least(x, limit) < -limit ? -limit : least(x, limit); }
DEVICE float plain(float x) {
  if (FORMULA == 1) return x * sigmoid(x);
  if (FORMULA == 2) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if (FORMULA == 3)
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  if (FORMULA == 4) {
    float positive = x < 0.0f ? 0.0f : x;
    return positive * positive;
  }
  return x;
}
DEVICE float gated(float gate, float up, const Arguments& a) {
  if (FORMULA == 7) {
    if (a.beta != 0.0f) up = a.beta * tanhf(up / a.beta);
    return a.alpha * tanhf(gate / a.alpha) * sigmoid(gate) * up;
  }
  if (FORMULA == 6) {
    float act = gate * sigmoid(gate);
    return least(act, a.limit) * within(up, a.limit);
  }
  if (LIMITED) {
    gate = least(gate, a.limit);
    up = within(up, a.limit);
  }
  if (FORMULA == 5) return (up + a.beta) * gate * sigmoid(a.alpha * gate);
  return plain(gate) * up;
}

// Where a warp is: step k of the rows of a task.
struct Walk {
  int task, k;
};

DEVICE int turn(int i, int count) { return i + 1 == count ? 0 : i + 1; }

extern "C" __global__ void __launch_bounds__(WARPS * 32, PER_SM)
quantized_decode(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  __shared__ int lone_experts[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int kw = warp % KW, wm = warp / KW;
  const int g = lane >> 2, t = lane & 3;
  const u32 shared_base = shared_address(memory);
  const u32 ring = shared_base + warp * RING_BYTES;
  const int G = gridDim.x;
  const int k_begin = kw * S / KW, k_end = (kw + 1) * S / KW;

  if (!EARLY) {
    wait_for_previous();
    let_next_begin();
  }
  if (LONE) {
    if (threadIdx.x < 32) {
      int slot = threadIdx.x, expert = -1;
      if (slot < a.R) {
        i64 id = ID64 ? ((const i64*)a.ids)[slot] : (i64)((const int*)a.ids)[slot];
        if (a.map) id = id >= 0 && id < a.num_mapped ? a.map[id] : -1;
        expert = id >= 0 && id < a.num_local ? (int)id : -1;
      }
      lone_experts[slot] = expert;
    }
    __syncthreads();
  }
  const int blocks = LONE ? a.R : *a.num_post / BN;
  const int tasks = blocks * TILES;

  // A task's slots, and where its rows begin.
  auto expert_of = [&](const Walk& w) {
    int block = w.task / TILES;
    if (LONE) return lone_experts[block];
    int expert = a.experts[min(block, a.last_block)];
    return min(max(expert, 0), a.num_local - 1);
  };
  auto next_task = [&](int task) {
    task += G;
    if (LONE)
      while (task < tasks && lone_experts[task / TILES] < 0) task += G;
    return task;
  };
  auto advance = [&](Walk& w) {  // to the next step; whether it is of another task
    if (++w.k < k_end) return false;
    w.task = next_task(w.task);
    w.k = k_begin;
    return true;
  };
  auto feature = [&](int task, int mt) {
    int first = task % TILES * FT + (wm * MT + mt) * FM;
    return FEATURES % FT ? min(first, FEATURES - FM) : first;
  };
  auto first_group = [&](int k) { return GROUP == 0 ? 0 : k * STEP_COLS / (GROUP ? GROUP : 1); };
  // The row of scales that belongs to row r (of 16) of tile mt.
  auto scale_row = [&](int task, int mt, int r) {
    int f = feature(task, mt) + (GATED ? r & 7 : r);
    return (GATED && r >= 8 ? SCALE_SHARD : 0) + f / SCALE_BLOCK * SCALE_STEP;
  };

  // ---- the producer ----
  constexpr int ROWS_AT_ONCE = 32 / CPR;
  Walk ahead = Walk{0, 0};
  const u8* from = a.weights;  // this lane's piece of the next step
  int tile_offset[MT];         // where tiles do not lie one below the other
  i64 ahead_scales = 0;        // where the expert's begin
  int ahead_span = 0, ahead_slot = 0;
  const int lane_row = lane / CPR, lane_chunk = lane % CPR;
  const u32 lane_to =
      ring + lane_row * STEP + ((lane_chunk ^ (STEP == 64 ? (lane_row >> 1) & 3 : lane_row)) << 4);
  auto aim = [&]() {
    if (ahead.task >= tasks) return;
    int expert = expert_of(ahead);
    from = a.weights + expert * EXPERT_BYTES + feature(ahead.task, 0) * (i64)ROW_STRIDE +
           (lane_row * ROW_STRIDE + lane_chunk * 16 + ahead.k * STEP);
    if (FEATURES % FT) {
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
        tile_offset[mt] = (feature(ahead.task, mt) - feature(ahead.task, 0)) * ROW_STRIDE;
    }
    ahead_scales = expert * (i64)EXPERT_SCALES;
    ahead_span = 0;
  };
  // Eight lanes take the 32 bytes of a row from the word on in which a span begins.
  auto issue_span = [&](u32 to, const u8* base, int unit, bool loose) {
    const int group = first_group(ahead.k);
    const u8* all = base + (ahead_scales + group) * unit + (lane & 7) * 4;
#pragma unroll
    for (int i = 0; i < MT * 4; i++) {
      const int row = i * 4 + lane / 8;
      const u8* at = all + scale_row(ahead.task, i / 4, row % 16) * (SCALE_STRIDE * unit);
      const int miss = loose ? (int)(u64)at & 3 : 0;
      copy4(to + row * PITCH + (lane & 7) * 4, at - miss,
            (lane & 7) * 4 < (SCALE_STRIDE - group) * unit + miss);
    }
  };
  auto issue = [&](u32 offset) {
    if (ahead.task < tasks) {
      const bool inside = !CUT || ahead.k * STEP + lane_chunk * 16 < ROW_BYTES;
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int mt = i * ROWS_AT_ONCE / 16, half = i * ROWS_AT_ONCE % 16 / 8;
        const int rest = i * ROWS_AT_ONCE % 8;
        const int tile = FEATURES % FT ? tile_offset[mt] : mt * FM * ROW_STRIDE;
        const u32 to = STEP == 64 ? lane_to : lane_to ^ (i & 1 ? 64 : 0);
        copy16(to + offset + i * 512, from + (tile + half * HALF_OFFSET + rest * ROW_STRIDE), inside);
      }
      if (RINGED) {
        if (ahead_span == 0) {
          const u32 to = ring + STAGES * TILE_BYTES + ahead_slot * SPAN_BYTES;
          issue_span(to, a.scale, SB, SCALE_LOOSE);
          if (ZERO) issue_span(to + SPANS * SPAN_BYTES, a.zero, 1, ZERO_LOOSE);
          ahead_slot = turn(ahead_slot, SPANS);
        }
        ahead_span = turn(ahead_span, SPAN);
      }
      from += STEP;
      if (advance(ahead)) aim();
    }
    commit();
  };
  int task = blockIdx.x;
  if (LONE)
    while (task < tasks && lone_experts[task / TILES] < 0) task += G;
  ahead = Walk{task, k_begin};
  aim();
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; stage++) issue(stage * TILE_BYTES);
  if (EARLY) {
    wait_for_previous();
    let_next_begin();
  }

  // ---- x, one beat ahead ----
  Walk coming = Walk{task, k_begin};
  const u16* x_at[NT];
  u32 fresh[4 * XR * NT];
  auto find_x = [&]() {
    if (coming.task >= tasks) return;
    const int block = coming.task / TILES;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      int slot = block;
      if (!LONE) {
        // Places without a slot take the block's first, whose sums they then throw away.
        slot = a.sorted[block * BN + n * 8 + g];
        if (slot < 0 || slot >= a.R) slot = a.sorted[block * BN];
        slot = min(max(slot, 0), a.R - 1);
      }
      x_at[n] = a.x + (i64)(slot / TOP_K) * a.stride_x + (coming.k * STEP_COLS + t * (FOUR ? 8 : 4));
    }
  };
  auto load_x = [&](int beat) {
    if (coming.task >= tasks) return;
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        u32* to = fresh + (n * 4 + c) * XR;
        const int column = beat * BEAT_COLS + c * CHUNK_COLS;
        const u16* at = x_at[n] + column;
        const bool inside =
            (S - 1) * STEP_COLS + column < COLUMNS || coming.k * STEP_COLS + column < COLUMNS;
        if (FOUR) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (inside) v = *(const uint4*)at;
          to[0] = v.x, to[1] = v.y, to[XR - 2] = v.z, to[XR - 1] = v.w;
        } else {
          uint2 v = make_uint2(0, 0);
          if (inside) v = *(const uint2*)at;
          to[0] = v.x, to[1] = v.y;
        }
      }
    }
  };
  auto proceed = [&]() {
#pragma unroll
    for (int n = 0; n < NT; n++) x_at[n] += STEP_COLS;
    if (advance(coming)) find_x();
  };
  find_x();
  load_x(0);

  // ---- the products ----
  const u32 lane_from = (lane & 15) * STEP;
  const int lane_swizzle = STEP == 64 ? (lane >> 1) & 3 : lane & 7;
  float acc[MT][NT][4];
  int stage = 0, parity = 0, slot = 0;
  u32 scales[MT][2], zeros[MT][2];  // less what precedes the span
  while (task < tasks) {
    const int block = task / TILES;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[mt][n][i] = 0.0f;
    int span = 0;
    for (int k = k_begin; k < k_end; k++) {
      wait_groups<STAGES - 2>();
      __syncwarp();
      {
        int free = stage + STAGES - 1;
        issue((free >= STAGES ? free - STAGES : free) * TILE_BYTES);
      }
      if (RINGED) {
        if (span == 0) {
          const int group = first_group(k);
          const i64 first = SCALE_LOOSE || ZERO_LOOSE
                                ? expert_of(Walk{task, k}) * (i64)EXPERT_SCALES + group : 0;
#pragma unroll
          for (int mt = 0; mt < MT; mt++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int row = mt * 16 + half * 8 + g;
              const int low = (int)first + scale_row(task, mt, half * 8 + g) * SCALE_STRIDE;
              const u32 at = ring + STAGES * TILE_BYTES + slot * SPAN_BYTES + row * PITCH;
              scales[mt][half] = at + (SCALE_LOOSE ? low * SB & 3 : 0) - group * SB;
              zeros[mt][half] = at + SPANS * SPAN_BYTES + (ZERO_LOOSE ? low & 3 : 0) - group;
            }
          }
          slot = turn(slot, SPANS);
        }
        span = turn(span, SPAN);
      }
      const int group = first_group(k);
      const u32 tile = ring + stage * TILE_BYTES;
#pragma unroll
      for (int beat = 0; beat < BEATS; beat++) {
        u32 paired[4][NT][XR];
#pragma unroll
        for (int c = 0; c < 4; c++) {
#pragma unroll
          for (int n = 0; n < NT; n++) {
            const u32* own = fresh + (n * 4 + c) * XR;
#pragma unroll
            for (int i = 0; i < XR; i++) {
              u32 two = __byte_perm(own[i / 2], own[i / 2 + XR / 2], i % 2 ? 0x7632 : 0x5410);
              paired[c][n][i] = RAISED ? multiply2(two, 0x5F805F80u) : two;
            }
          }
        }
        if (beat == BEATS - 1) proceed();
        load_x(beat == BEATS - 1 ? 0 : beat + 1);
        float part[MT][NT][4], sums[NT][4];
        u32 w[MT][4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          if (c % 2 == 0) {
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
              ldmatrix(w[mt], tile + mt * 16 * STEP + lane_from +
                                  (((beat * 4 + c + (lane >> 4)) ^ lane_swizzle) << 4));
          }
          if (FOLD && c % GC == 0) {
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
              for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
          }
          u32(&b)[NT][XR] = paired[c];
#pragma unroll
          for (int n = 0; n < NT; n++) {
            if (ELEMENT == INT4) {
              const u32 one = ZERO ? 0xBF80BF80u : 0xC308C308u;  // -1, or -(128 + 8)
              mma(sums[n], one, one, one, one, b[n][0], b[n][1]);
              mma(sums[n], one, one, one, one, b[n][XR - 2], b[n][XR - 1]);
            }
          }
          if (FOLD && c % GC == 0) {
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
              for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                  part[mt][n][i] = ELEMENT == INT4 && GC == 1 && !ZERO ? sums[n][i] : 0.0f;
          }
#pragma unroll
          for (int mt = 0; mt < MT; mt++) {
            u32 v[2][XR];
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const u32 word = w[mt][c % 2 * 2 + half];
              if (ELEMENT == INT4) {
                v[half][0] = and_or(word, 0x000F000Fu, 0x43004300u);
                v[half][1] = and_or(word >> 4, 0x000F000Fu, 0x43004300u);
                v[half][XR - 2] = and_or(word >> 8, 0x000F000Fu, 0x43004300u);
                v[half][XR - 1] = and_or(word >> 12, 0x000F000Fu, 0x43004300u);
              } else if (ELEMENT == E2M1) {
                // Bits 8 to 6 are taken from a shifted word, all others from its signs alone, in one
                // lop3; those signs that would miss bit 15 fall on bit 7, or off the end.
                const u32 even = word & 0x08080808u, odd = word & 0x80808080u;
                v[half][0] = select(0x01C001C0u, word << 6, even << 12);
                v[half][1] = select(0x01C001C0u, word << 2, odd << 8);
                v[half][XR - 2] = select(0x01C001C0u, word >> 2, even << 4);
                v[half][XR - 1] = select(0x01C001C0u, word >> 6, odd);
                if (IN_REG) {
                  // e4m3 as bf16 is short of 2^-120; times 2^183 leaves 2^63 to the epilogue.
                  u32 byte = shared_u8(scales[mt][half] + group + (beat * 4 + c) * 2 + (t >> 1));
                  u32 two = byte << 4 | byte << 20;
                  two = multiply2(multiply2(two, 0x6D806D80u), 0x6D006D00u);
#pragma unroll
                  for (int i = 0; i < XR; i++) v[half][i] = multiply2(v[half][i], two);
                }
              } else if (ELEMENT == INT8) {
                const u32 high = word >> 8;
                v[half][0] = minus2(and_or(word, 0x007F007Fu, 0x43004300u),
                                    and_or(word, 0x00800080u, 0x43004300u));
                v[half][1] = minus2(and_or(high, 0x007F007Fu, 0x43004300u),
                                    and_or(high, 0x00800080u, 0x43004300u));
              } else {
                v[half][0] = and_or(word << 4, 0x07F007F0u, (word << 8) & 0x80008000u);
                v[half][1] = and_or(word >> 4, 0x07F007F0u, word & 0x80008000u);
              }
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
              float(&sum)[4] = FOLD ? part[mt][n] : acc[mt][n];
              mma(sum, v[0][0], v[1][0], v[0][1], v[1][1], b[n][0], b[n][1]);
              if (FOUR)
                mma(sum, v[0][XR - 2], v[1][XR - 2], v[0][XR - 1], v[1][XR - 1], b[n][XR - 2],
                    b[n][XR - 1]);
            }
          }
          if (FOLD && (c + 1) % GC == 0) {
            const int column = beat * BEAT_COLS + (c + 1 - GC) * CHUNK_COLS;
            const int index = SPS == 1 ? 0 : column / (GROUP ? GROUP : 1);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
#pragma unroll
              for (int half = 0; half < 2; half++) {
                float factor = 1.0f;
                if (RINGED && !IN_REG) factor = stored_scale(scales[mt][half] + (group + index) * SB);
                float middle = 0.0f;
                if (ZERO) {
                  u32 zero = shared_u8(zeros[mt][half] + group + index);
                  middle = as_float(0x43000000u | zero << 16);  // 128 + zero
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
#pragma unroll
                  for (int i = 2 * half; i < 2 * half + 2; i++) {
                    float value = part[mt][n][i];
                    if (ZERO)
                      value = fmaf(middle, sums[n][i], value);
                    else if (ELEMENT == INT4 && GC != 1)
                      value += sums[n][i];
                    acc[mt][n][i] = fmaf(factor, value, acc[mt][n][i]);
                  }
                }
              }
            }
          }
        }
      }
      stage = turn(stage, STAGES);
    }

    // ---- the epilogue ----
    auto emit = [&](int mt, int n, float (&v)[4]) {
      const float exponent = IN_REG ? 0x1p63f : ELEMENT == E2M1 ? 0x1p62f : ELEMENT == E4M3 ? 0x1p56f : 1.0f;
      const int first = feature(task, mt);
      if (LONE && (t != 0 || n != 0)) return;
      const int expert = expert_of(Walk{task, 0});
      float factor[2], added[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        factor[half] = exponent;
        if (!RINGED)
          factor[half] *= global_scale(
              a.scale, expert * EXPERT_SCALES + (i64)scale_row(task, mt, g + 8 * half) * SCALE_STRIDE);
        if (SCALE2) factor[half] *= a.scale2[expert * (GATED ? 2 : 1) + (GATED ? half : 0)];
        added[half] = 0.0f;
        if (BIAS) {
          i64 at = (i64)expert * (GATED ? 2 * FEATURES : FEATURES) + (i64)(first + g) * ROW_STEP;
          added[half] = bias_at(a.bias, at + half * (GATED ? SHARD_STEP : 8 * ROW_STEP));
        }
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int slot = LONE ? (i == 0 ? block : -1) : a.sorted[block * BN + n * 8 + 2 * t + i];
        if (slot < 0 || slot >= a.R) continue;
        float low = fmaf(v[i], factor[0], added[0]), high = fmaf(v[2 + i], factor[1], added[1]);
        i64 at = (i64)slot * FEATURES + first + g;
        if (GATED) {
          ((u16*)a.out)[at] = float_bf16(gated(low, high, a));
        } else if (WIDE) {
          ((float*)a.out)[at] = plain(low);
          ((float*)a.out)[at + 8] = plain(high);
        } else {
          ((u16*)a.out)[at] = float_bf16(plain(low));
          ((u16*)a.out)[at + 8] = float_bf16(plain(high));
        }
      }
    };
    if (KW == 1) {
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int n = 0; n < NT; n++) emit(mt, n, acc[mt][n]);
    } else {
      // Two buffers in turns: whoever writes one again has met the others at the barrier between.
      float4* parts = (float4*)(memory + WARPS * RING_BYTES) +
                      (parity * WM + wm) * KW * MT * NT * 32 + lane;
#pragma unroll
      for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int n = 0; n < NT; n++)
          parts[((mt * NT + n) * KW + kw) * 32] =
              make_float4(acc[mt][n][0], acc[mt][n][1], acc[mt][n][2], acc[mt][n][3]);
      meet<KW * 32>(1 + wm);
#pragma unroll
      for (int i = 0; i < MT * NT; i++) {
        if (i % KW != kw) continue;
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < KW; j++) {
          float4 part = parts[(i * KW + j) * 32];
          v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
        }
        emit(i / NT, i % NT, v);
      }
      parity ^= 1;
    }
    task = next_task(task);
  }
  wait_groups<0>();
}
