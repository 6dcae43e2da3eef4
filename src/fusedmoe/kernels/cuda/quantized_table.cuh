// Nibbles that stand for the entries of a table in bf16: TABLE_0 and so on hold two of them, times
// TABLE_LIFT / 2^16.
//
// A byte, two neighbouring columns, becomes their two numbers by one load from shared memory, where
// every lane has a copy of all 256 pairs in a bank of its own.

constexpr int TABLE_BYTES = ELEMENT == TABLE ? 256 * 32 * 4 : 0;

#ifdef TABLE_0
#define ENTRY_PAIRS TABLE_0, TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_6, TABLE_7
#else
#define ENTRY_PAIRS
#endif

DEVICE constexpr u32 entry(u32 i) {
  constexpr u32 pairs[8] = {ENTRY_PAIRS};
  return pairs[i / 2] >> 16 * (i % 2) & 0xFFFFu;
}

DEVICE void write_table(const Place& p, u32 table) {
#pragma unroll 1
  for (u32 high = p.warp; high < 16; high += WARPS) {
    u32 second = 0;
#pragma unroll
    for (u32 i = 0; i < 16; i++) second = i == high ? entry(i) << 16 : second;
#pragma unroll
    for (u32 low = 0; low < 16; low++)
      store_shared(table + (high * 16 + low) * 128 + p.lane * 4, second | entry(low));
  }
  __syncthreads();
}

// ``own``: this lane's copy. Columns (2 * i, 2 * i + 1) in register i.
DEVICE void look_up(u32 (&v)[XR], u32 word, u32 own) {
  const u32 pairs[4] = {word << 7, word >> 1, word >> 9, word >> 17};
#pragma unroll
  for (int i = 0; i < XR; i++) v[i] = shared_u32(own + (pairs[i] & 0x7F80u));
}
