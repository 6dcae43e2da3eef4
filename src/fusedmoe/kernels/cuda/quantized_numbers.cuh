// From stored weights, scales, zero points and biases to numbers.
//
// A thread's word holds 8 columns of a 4-bit type or 4 of an 8-bit one, and becomes XR registers of
// two bf16 each: columns (i, i + XR) in register i. What a type leaves out of its numbers, UNIT
// makes up for in the epilogue; RAISED ones need x times 2^64, or sums would pass below fp32.

#ifndef TABLE_LIFT
#define TABLE_LIFT 65536
#endif
constexpr int INT4 = 0, E2M1 = 1, INT8 = 2, E4M3 = 3, TABLE = 4;
constexpr bool FOUR = ELEMENT <= E2M1 || ELEMENT == TABLE;
constexpr int XR = FOUR ? 4 : 2;
// Groups of 16 (nvfp4) scale the weights: e2m1 times e4m3 is exact in bf16.
constexpr bool SCALED = ELEMENT == E2M1 && GROUP == 16;
constexpr bool RAISED = ELEMENT != INT8 && ELEMENT != TABLE && !SCALED;
constexpr float UNIT = ELEMENT == TABLE  ? 65536.0f / TABLE_LIFT
                       : ELEMENT == INT4 ? 0x1p69f
                       : SCALED          ? 0x1p63f
                       : ELEMENT == E2M1 ? 0x1p62f
                       : ELEMENT == E4M3 ? 0x1p56f
                                         : 1.0f;

// int4: times 2^-133, as bf16's denormal numbers and those right above them are spaced evenly; odd
// registers 16 times that, of x a 16th. e2m1: times 2^-126. int8. e4m3: times 2^-120, NaN as 480.
DEVICE void numbers(u32 (&v)[XR], u32 word) {
  if (ELEMENT == INT4) {
    const u32 high = word >> 8;
    v[0] = word & 0x000F000Fu;
    v[1] = word & 0x00F000F0u;
    v[XR - 2] = high & 0x000F000Fu;
    v[XR - 1] = high & 0x00F000F0u;
  } else if (ELEMENT == E2M1) {
    // Bits 8 to 6 are taken from the word, all others from its signs alone, in one lop3 before both
    // go to their places; those signs that miss bit 15 fall on bits 8 to 6, or off the end.
    const u32 even = word & 0x08080808u, odd = word & 0x80808080u, size = 0x01C001C0u;
    const u32 right = shift_right<6>(word);
    v[0] = shift_left<6>(select(size >> 6, word, shift_left<6>(even)));
    v[1] = shift_left<2>(select(size >> 2, word, shift_left<6>(odd)));
    v[XR - 2] = shift_left<4>(select(size >> 4, right, even));
    v[XR - 1] = select(size, right, odd);
  } else if (ELEMENT == INT8) {
    // (128 + low seven bits) - (128 or, where negative, 256)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 bytes = word >> 8 * i;
      v[i] = minus2(and_or(bytes, 0x007F007Fu, 0x43004300u),
                    and_or(bytes, 0x00800080u, 0x43004300u));
    }
  } else {
    v[0] = and_or(word << 4, 0x07F007F0u, (word << 8) & 0x80008000u);
    v[1] = and_or(word >> 4, 0x07F007F0u, word & 0x80008000u);
  }
}

// SCALED numbers, times 2^63 for what e2m1 lacks: e4m3 as bf16 is short of 2^-120.
DEVICE void scale_numbers(u32 (&v)[XR], u32 e4m3) {
  const u32 two = multiply2(multiply2(e4m3 << 4 | e4m3 << 20, 0x6D806D80u), 0x6D006D00u);
#pragma unroll
  for (int i = 0; i < XR; i++) v[i] = multiply2(v[i], two);
}

// x of 8 or 4 neighbouring columns in the order of numbers(), or of look_up().
DEVICE void pair_up(u32 (&to)[XR], const u32* x) {
#pragma unroll
  for (int i = 0; i < XR; i++) {
    if (ELEMENT == TABLE) {
      to[i] = x[i];
      continue;
    }
    const u32 two = __byte_perm(x[i / 2], x[i / 2 + XR / 2], i % 2 ? 0x7632 : 0x5410);
    to[i] = RAISED ? multiply2(two, ELEMENT == INT4 && i % 2 ? 0x5D805D80u : 0x5F805F80u) : two;
  }
}

// Where a feature goes, and times what, in rows for a next GEMM: kernels/align_pair.py's order of
// width NEXT, 0: as they are.
DEVICE int paired_place(int feature) {
  if (NEXT == 0) return feature;
  constexpr int WIDTH = NEXT ? NEXT : 1;
  const int column = feature % (8 * WIDTH), own = column % (2 * WIDTH);
  return feature - column + own % WIDTH * 8 + column / (2 * WIDTH) * 2 + own / WIDTH;
}
DEVICE float paired_unit(int feature) {
  return as_float((127 + (feature % 2 ? NEXT_ODD : NEXT_EVEN)) << 23);
}

// Scales and biases are of a TYPE: fp32, bf16, fp16, e8m0 (e4m3 is read by scale_numbers). Bits are
// loaded early and become numbers where they are needed.
template <int TYPE>
DEVICE u32 bits_at(const void* at, i64 index) {
  if (TYPE == 0) return ((const u32*)at)[index];
  if (TYPE < 3) return ((const u16*)at)[index];
  return ((const u8*)at)[index];
}
template <int TYPE>
DEVICE float number(u32 bits) {
  if (TYPE == 0) return as_float(bits);
  if (TYPE == 1) return as_float(bits << 16);
  if (TYPE == 2) return half_float((u16)bits);
  return as_float(bits << 23);
}
DEVICE float stored_scale(u32 address) {
  if (SCALE == 0) return number<SCALE>(shared_u32(address));
  return number<SCALE>(SCALE < 3 ? shared_u16(address) : shared_u8(address));
}
DEVICE float stored_middle(u32 address) {
  return as_float(0x4B000000u | shared_u8(address)) - 0x1p23f;
}
