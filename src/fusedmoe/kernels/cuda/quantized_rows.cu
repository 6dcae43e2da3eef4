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
// point of int4 adds, sums of x take away.
//
// EARLY: the launch before is the first GEMM; weights and tables, or ids, are read before it has
// ended. The launch that wrote them has, because the first GEMM waits for it before it lets this begin.
// Other constants come from the launcher as macros; quantized_rows.py names them, and the files
// whose text stands before this one.

// Where things lie in shared memory: the ring, sums that warps exchange, sums of x, barriers, tables.
constexpr int EXCHANGED_AT = RING_BYTES, OF_X_AT = EXCHANGED_AT + EXCHANGE_BYTES;
constexpr int BARRIERS_AT = OF_X_AT + SUM_BYTES;
DEVICE Tables& tables() {
  DYNAMIC_SHARED(memory);
  return *(Tables*)(memory + (BARRIERS_AT + BARRIER_BYTES + 15) / 16 * 16);
}

extern "C" __global__ void __launch_bounds__((WARPS + BRINGERS) * 32, PER_SM)
quantized_rows(const __grid_constant__ Arguments a) {
  DYNAMIC_SHARED(memory);
  const Place p = find_place(true);
  float4* const sums = (float4*)(memory + EXCHANGED_AT);
  u8* const of_x = memory + OF_X_AT;
  const Ring ring(shared_address(memory), shared_address(memory + BARRIERS_AT));
  const Parts parts(sums, ring.behind());
  begin_barriers(ring, parts);
  barriers_have_begun();
  __syncthreads();
  if (!EARLY) {
    wait_for_previous();
    let_next_begin();
  }
  const int blocks = LONE ? a.R : MADE ? make_tables<(WARPS + BRINGERS) * 32>(a) : load_past_l1(a.num_post) / BN;
  const int stretches = blocks * PARTS;
  if (p.warp >= WARPS) {
    if (REGISTERS) give_registers<BRINGER_REGISTERS>();
    if (p.warp == WARPS) bring(a, stretches, ring, Anywhere());
    return;
  }
  if (REGISTERS) take_registers<REGISTERS>();
  consume(p, a, stretches, ring, parts, of_x, [] {
    if (EARLY) wait_for_previous(), let_next_begin();
  });
}
