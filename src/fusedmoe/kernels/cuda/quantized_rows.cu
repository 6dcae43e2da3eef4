// A few slots per expert on Hopper: one GEMM whose quantized weights stream once, whole rows at a
// time, past rows of x that stay in registers.
//
// out[slot, f] = act(x[slot / TOP_K] . w[expert(slot)] + bias). Blocks of NT eights of slots from
// tables, or (LONE) every slot by itself, which reads its own id.
//
// Weights are the M side of mma.m16n8k16, slots the N side. One warp asks for whole rows of weights
// and their scales by bulk copies into a ring, the first of BRINGERS, whose registers the others
// have; WARPS multiply: WM side by side of MT tiles of 16 rows each (GATED: eight of gate, eight of
// up, so that both numbers of a feature meet in one thread), KW along the columns. Each has its own
// part of x, which it loads once per block of slots. An item is (block of slots, part of the columns,
// ROWS rows), a program has neighbouring ones. Where columns are too many for that, PARTS rows of out
// are the parts of a slot's sum. A stretch is the items of one block and part.
//
// Sums of KW warps meet in shared memory, two buffers in turns. They are added up one tile late, by
// another of the warps for each tile, so that nobody waits for the others.
//
// The sum over columns may be taken in any order, so no nibble is moved: the 4 bytes that ldmatrix
// hands a thread count as the columns that the instruction expects of it, and x is paired to match.
// A group's products are summed by themselves and multiplied by the scale in fp32. What the zero
// point of int4 adds, sums of x take away. Blocks of at most four slots of int4 are multiplied in
// integers (quantized_rows_digits.cuh).
//
// EARLY: the launch before is the first GEMM; weights and tables, or ids, are read before it has
// ended. The launch that wrote them has, because the first GEMM waits for it before it lets this begin.
// Other constants come from the launcher as macros; quantized_rows.py names them, and the files
// whose text stands before this one.

// This warp's columns of x, for a stretch.
struct Rows {
  u32 x[NT][2 * PAIRS][XR];
  float sums[SUMS_STAY ? UNITS : 1][NT][4];  // of x times what takes the zero point away
  float4* others;                            // or where they are
  int known = -1, lead, slots[NT];           // of the block that comes next
  int split = SPLITTING && LONE ? 8 : 1;     // of the block that is there

  DEVICE void look(const Place& p, const Arguments& a, int block) {
    known = block;
    lead = slot_of(a, block, 0);
#pragma unroll
    for (int n = 0; n < NT; n++) slots[n] = slot_of(a, block, n * 8 + p.g);
  }
  // ``end``: of this program's stretches.
  DEVICE void load(const Place& p, const Arguments& a, int stretch, int end) {
    if (!LONE && stretch / PARTS != known) look(p, a, stretch / PARTS);
    if (SPLITTING && !LONE) {
      const u32 taken = lanes_with(slots[0] >= 0 && slots[0] < a.R);
      split = taken >> 16 ? 1 : taken >> 8 ? 2 : 4;
    }
    const int own = p.g / (8 / split);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      // Places without a slot take the block's first, whose sums they then throw away.
      int slot = LONE ? stretch : slots[n];
      if (SPLITTING && !LONE) slot = from_lane(slot, p.g % (8 / split) * 4);
      if (slot < 0 || slot >= a.R) slot = lead;
      slot = min(max(slot, 0), a.R - 1);
      const u16* from = a.x + (i64)(slot / TOP_K) * a.stride_x +
                        (stretch % PARTS * COLUMNS + p.k_begin * STEP_COLS + p.t * 2 * XR);
#pragma unroll
      for (int c = 0; c < 2 * PAIRS; c++) {
        const bool inside =
            (c & (split - 1)) == own && (c / 2 < FEWEST || p.k_begin + c / 2 < p.k_end);
        const u16* one = from + c * CHUNK_COLS;
        if (FOUR) {
          const uint4 v = inside ? *(const uint4*)one : make_uint4(0, 0, 0, 0);
          x[n][c][0] = v.x, x[n][c][1] = v.y, x[n][c][XR - 2] = v.z, x[n][c][XR - 1] = v.w;
        } else {
          const uint2 v = inside ? *(const uint2*)one : make_uint2(0, 0);
          x[n][c][0] = v.x, x[n][c][1] = v.y;
        }
      }
    }
    const int next = stretch + 1, unit = GC * split;
    if (!LONE && next < end && next / PARTS != known) look(p, a, next / PARTS);
    float all[4];
#pragma unroll
    for (int i = 0; i < NT * 2 * PAIRS; i++) {
      const int n = i / (2 * PAIRS), c = i % (2 * PAIRS);
      u32 own[XR];
#pragma unroll
      for (int j = 0; j < XR; j++) own[j] = x[n][c][j];
      pair_up(x[n][c], own);
      if (ELEMENT != INT4) continue;
      if ((c & (unit - 1)) == 0) all[0] = all[1] = all[2] = all[3] = 0.0f;
      // -8, as numbers() has it in even and odd registers.
      const u32 even = 0x80088008u, odd = 0x80808080u;
      mma(all, even, even, odd, odd, x[n][c][0], x[n][c][1]);
      mma(all, even, even, odd, odd, x[n][c][XR - 2], x[n][c][XR - 1]);
      // Those of a unit of several groups are kept as the first one's.
      const int first = (c & ~(unit - 1)) / GC;
#pragma unroll
      for (int j = 0; j < 4 * UNITS && SUMS_STAY; j++)
        if (j / 4 == first) sums[j / 4][n][j % 4] = all[j % 4];
      if (!SUMS_STAY && p.g == 0 && ((c + 1 & (unit - 1)) == 0 || c + 1 == 2 * PAIRS))
        others[(first * NT + n) * 4 + p.t] = make_float4(all[0], all[1], all[2], all[3]);
    }
    if (!SUMS_STAY) __syncwarp();
  }
  // Of this thread's sums, number ``i`` of each eight.
  static DEVICE int column(const Place& p, int i) { return 2 * p.t + i; }
  DEVICE void multiply(float (&acc)[NT][4], const Place& p, u32 place, int row,
                       const u32 (&scales)[2]) const;
  // Of x in the chunks from c on that share a scale or a product.
  DEVICE float4 sum(const Place& p, int c, int n) const {
    if (ELEMENT != INT4) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float(&own)[4] = sums[SUMS_STAY ? c / GC : 0][n];
    if (SUMS_STAY) return make_float4(own[0], own[1], own[2], own[3]);
    return others[(c / GC * NT + n) * 4 + p.t];
  }
};

// The products of this warp's part of a tile of 16 rows, scales of two of them. So many (SPLIT)
// groups have columns of their own.
template <int SPLIT>
DEVICE void products_of(float (&acc)[NT][4], const Place& p, u32 place, int row,
                        const u32 (&scales)[2], const Rows& rows) {
  constexpr int UNIT_CHUNKS = SPLIT * GC;
  constexpr bool TWO = SPLIT == 1 && TWO_SCALES;
  float part[NT][4];
  u32 w[4], two[2];
#pragma unroll
  for (int c = 0; c < 2 * PAIRS; c++) {
    if (c / 2 >= FEWEST && p.k_begin + c / 2 >= p.k_end) break;
    if (c % 2 == 0) ldmatrix(w, chunk_at(p, place, row, c));
    u32 v[2][XR];
#pragma unroll
    for (int half = 0; half < 2; half++) numbers(v[half], w[c % 2 * 2 + half]);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if (c % UNIT_CHUNKS == 0) {
        const float4 sum = rows.sum(p, c, n);
        part[n][0] = sum.x, part[n][1] = sum.y, part[n][2] = sum.z, part[n][3] = sum.w;
      }
#pragma unroll
      for (int i = 0; i < XR; i += 2)
        mma(part[n], v[0][i], v[1][i], v[0][i + 1], v[1][i + 1], rows.x[n][c][i],
            rows.x[n][c][i + 1]);
    }
    const bool last = c % 2 == 1 && c + 1 >= 2 * FEWEST && p.k_begin + (c + 1) / 2 >= p.k_end;
    if ((c + 1) % UNIT_CHUNKS && !last) continue;
    const int begin = c / UNIT_CHUNKS * UNIT_CHUNKS;
    const int group = ALIGNED ? begin * CHUNK_COLS / WIDTH + first_group(p.k_begin)
                              : (p.k_begin * STEP_COLS + begin * CHUNK_COLS) / WIDTH;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float factors[2];
#pragma unroll
      for (int i = 0; i < (SPLIT == 8 ? 2 : 1); i++) {
        int own = SPLIT > 1 ? (2 * p.t + i) * SPLIT / 8 : 0;
        if (c - begin < SPLIT - 1) own = min(own, c - begin);  // columns without a group are zero
        const u32 at = scales[half] + (group + own) * SCALE_BYTES;
        if (TWO && c % 2 == 0) two[half] = shared_u32(at);
        factors[i] =
            TWO ? number<SCALE>(c % 2 ? two[half] >> 16 : two[half] & 0xFFFF) : stored_scale(at);
      }
#pragma unroll
      for (int i = 0; i < NT * 2; i += LONE && SPLIT == 1 ? 2 : 1) {
        const int n = i / 2, j = half * 2 + i % 2;
        acc[n][j] = fmaf(factors[SPLIT == 8 ? i : 0], part[n][j], acc[n][j]);
      }
    }
  }
}

DEVICE void Rows::multiply(float (&acc)[NT][4], const Place& p, u32 place, int row,
                           const u32 (&scales)[2]) const {
  if (SPLITTING && LONE)
    products_of<8>(acc, p, place, row, scales, *this);
  else if (SPLITTING && split == 4)
    products_of<4>(acc, p, place, row, scales, *this);
  else if (SPLITTING && split == 2)
    products_of<2>(acc, p, place, row, scales, *this);
  else
    products_of<1>(acc, p, place, row, scales, *this);
}

template <class Rows>
DEVICE void take_stretch(const Place& p, const Arguments& a, int stretch, int end, Rows& rows,
                         Ends& ends) {
  __syncwarp();
  rows.load(p, a, stretch, end);
  ends.take_block<Rows>(p, a, stretch / PARTS, rows.split);
}

template <class Rows>
DEVICE void consume(const Place& p, const Arguments& a, int stretches, const Ring& ring,
                    Parts parts, u8* sums) {
  Rows rows;
  rows.others = (float4*)sums + p.warp * UNITS * NT * 4;
  Ends ends, before;
  Turns turns;
  // Rows of the first item are asked for beside its weights, in the EARLY launch once they are there.
  const int first = first_item(stretches, blockIdx.x);
  const int last = first_item(stretches, blockIdx.x + 1);
  const int end = (last + TILES - 1) / TILES;
  int known = first < last ? first / TILES : -1;
  if (EARLY) {
    if (!LONE && known >= 0) rows.look(p, a, known / PARTS);
    wait_for_previous();
    let_next_begin();
  }
  if (known >= 0) take_stretch(p, a, known, end, rows, ends);
  bool any = false;
  for (;; turns.next()) {
    wait_barrier(ring.full_at(turns.stage), turns.phase);
    ends.item = (int)shared_u32(ring.items + turns.stage * 4);
    if (ends.item < 0) {
      if (KW > 1 && any && parts.mine(p)) {
        before.load(p, a, MT - 1);
        parts.finish(p, a, before, MT - 1);
      }
      break;
    }
    if (ends.item >= (known + 1) * TILES) {
      known = ends.item / TILES;
      take_stretch(p, a, known, end, rows, ends);
    }
    const u32 place = ring.places + turns.stage * PLACE_BYTES;
    const u32 of_place = ring.scales + turns.stage * PLACE_SCALES + known % PARTS * SLICE % 16;
    const int slice = first_group(p.k_begin) * SCALE_BYTES / (SCALE_BOX ? SCALE_BOX : SLICE + 1);
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      const int tile = p.wm * MT + mt, last = mt ? mt - 1 : MT - 1;
      Ends& earlier = mt ? ends : before;
      const bool mine = KW > 1 && any && parts.mine(p);
      if (mine) earlier.load(p, a, last);
      if (KW == 1) ends.load(p, a, mt);
      float acc[NT][4];
#pragma unroll
      for (int i = 0; i < NT * 4; i++) acc[i / 4][i % 4] = 0.0f;
      u32 scales[2];
#pragma unroll
      for (int half = 0; half < 2; half++)
        scales[half] = of_place + scale_at(tile, half * 8 + p.g) * SCALE_PITCH +
                       slice * (ROWS - 1) * SCALE_PITCH;
      const int row = row_at(tile, p.lane & 15);
      rows.multiply(acc, p, place, row, scales);
      if (KW == 1) {
#pragma unroll
        for (int i = 0; i < NT; i++) ends.store(p, a, mt, i, acc[i]);
      } else {
        parts.write(p, acc);
      }
      // Only now: what was read of this place is in sums that have been stored. An arrival does not
      // wait for loads on their way, and those can be later than the copies that it asks for.
      __syncwarp();
      if (mt == MT - 1 && p.lane == 0) arrive(ring.empty_at(turns.stage));
      if (KW > 1) {
        if (mine) parts.finish(p, a, earlier, last);
        parts.next();
        any = true;
      }
    }
    before = ends;
  }
}

extern "C" __global__ void __launch_bounds__((WARPS + BRINGERS) * 32, PER_SM)
quantized_rows(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  const Place p = find_place(true);
  u8* const scales = memory + STAGES * PLACE_BYTES;
  float4* const sums = (float4*)(scales + STAGES * PLACE_SCALES);
  u8* const of_x = (u8*)(sums + (KW > 1 ? 2 * WARPS * NT * 32 : 0));
  u8* const barriers = of_x + SUM_BYTES;
  const u32 first = shared_address(barriers), parts = first + STAGES * 16;
  const Ring ring{shared_address(memory), shared_address(scales), parts + 4 * WM * 8, first,
                  first + STAGES * 8};
  if (threadIdx.x < STAGES) {
    begin_barrier(ring.full_at(threadIdx.x), 1);
    begin_barrier(ring.empty_at(threadIdx.x), WARPS);
  }
  if (threadIdx.x < 2 * WM) {
    begin_barrier(parts + threadIdx.x * 8, KW);
    begin_barrier(parts + (2 * WM + threadIdx.x) * 8, 1);
  }
  barriers_have_begun();
  __syncthreads();
  if (!EARLY) {
    wait_for_previous();
    let_next_begin();
  }
  const int blocks = LONE ? a.R : MADE ? make_tables(a) : load_past_l1(a.num_post) / BN;
  const int stretches = blocks * PARTS;
  if (p.warp >= WARPS) {
    if (REGISTERS) give_registers<BRINGER_REGISTERS>();
    if (p.warp == WARPS) bring(a, stretches, ring);
    return;
  }
  if (REGISTERS) take_registers<REGISTERS>();
  const Parts of_warps{sums, parts, parts + 2 * WM * 8};
  if constexpr (DIGITS)
    if (takes_digits(p, a, stretches))
      return consume<DigitRows>(p, a, stretches, ring, of_warps, of_x);
  consume<Rows>(p, a, stretches, ring, of_warps, of_x);
}
