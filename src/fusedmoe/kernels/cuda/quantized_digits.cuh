// Rows of x in digits, for int4 weights, that the integer units multiply.
//
// A chunk of x is unit * X, X = 256 * high + low of 15 bits, high and low of eight, and unit a power
// of two that its largest number decides: what is 2^-7 times that or more loses nothing. Weights are
// the unsigned nibbles, those of even columns as they are and of odd ones 16 times that; neither has
// to be shifted. Sums are 16 times what they stand for, and exact.

// Of a chunk, in shared memory: low digits, then high ones, of the eight columns of each of four
// threads, even ones before odd; and where its sum begins (zero points taken away), and its unit.
constexpr int DIGIT_BYTES = 64, UNIT_BYTES = 8;
constexpr int X_CHUNKS = UP_KW * UP_OWN * 8, ACT_CHUNKS = DOWN_KW * DOWN_OWN * 8;  // zeros beyond a row
constexpr int MOST_CHUNKS = X_CHUNKS > PICKS * ACT_CHUNKS ? X_CHUNKS : PICKS * ACT_CHUNKS;
constexpr int DIGITS_AT = (END_AT + 15) / 16 * 16;
constexpr int UNITS_AT = DIGITS_AT + MOST_CHUNKS * DIGIT_BYTES;

// Of ROWS rows of so many columns, CHUNKS (whole octets) each: loaded first, and made later.
template <int ROWS, int CHUNKS, int COLUMNS>
struct Digits {
  static constexpr int ALL = ROWS * CHUNKS * 4, OWN = (ALL + WARPS * 32 - 1) / (WARPS * 32);
  uint4 loaded[OWN];  // eight columns each

  // ``live`` rows are read.
  DEVICE Digits(const u16* from, int live) {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int own = threadIdx.x + i * WARPS * 32;
      const int row = own / (CHUNKS * 4), column = own % (CHUNKS * 4) * 8;
      loaded[i] = load_past_l1(from + row * COLUMNS + column, row < live && column < COLUMNS);
    }
  }
  DEVICE void make(u8* shared) const {
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int own = threadIdx.x + i * WARPS * 32;
      if (own < ALL) make_eight(shared, own / 4, own % 4, loaded[i]);  // whole warps of them
    }
  }
  static DEVICE void make_eight(u8* shared, int chunk, int t, const uint4& eight) {
    const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
    int most = 0, sum = 0, x[8];
#pragma unroll
    for (int j = 0; j < 4; j++)
      most = max(most, (int)max(words[j] & 0x7FFFu, words[j] >> 16 & 0x7FFFu));
    most = max(most, from_thread(most, 1));
    most = max(most, from_thread(most, 2)) >> 7;  // an exponent; of what is no number, 255
    const int raised = max(most, 18);             // so that a unit is one
    const float inverse = as_float(267 - raised << 23);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const u32 word = words[j / 2];
      x[j] = nearest(as_float(j % 2 ? word & 0xFFFF0000u : word << 16) * inverse);
      sum += x[j];
    }
    sum += from_thread(sum, 1);
    sum += from_thread(sum, 2);
#pragma unroll
    for (int digit = 0; digit < 2; digit++) {
      u32 four[2];
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        u32 y[4];
#pragma unroll
        for (int j = 0; j < 4; j++) y[j] = digit ? x[2 * j + odd] + 128 >> 8 : x[2 * j + odd];
        const u32 first = __byte_perm(y[0], y[1], 0x0040), second = __byte_perm(y[2], y[3], 0x0040);
        four[odd] = __byte_perm(first, second, 0x5410);
      }
      *(uint2*)(shared + DIGITS_AT + chunk * DIGIT_BYTES + (digit * 4 + t) * 8) =
          make_uint2(four[0], four[1]);
    }
    const u32 unit = most == 255 ? 0x7FC00000u : (u32)(raised - 17) << 23;
    if (t == 0)
      *(uint2*)(shared + UNITS_AT + chunk * UNIT_BYTES) = make_uint2((u32)(-128 * sum), unit);
  }
};
struct Unit {
  int begin;
  float factor;
};
DEVICE uint2 digits_at(const u8* shared, int chunk, int digit) {
  return *(const uint2*)(shared + DIGITS_AT + chunk * DIGIT_BYTES +
                         (digit * 4 + (threadIdx.x & 3)) * 8);
}
DEVICE Unit unit_at(const u8* shared, int chunk) {
  const uint2 both = *(const uint2*)(shared + UNITS_AT + chunk * UNIT_BYTES);
  return {(int)both.x, as_float(both.y)};
}

// Sums of 16 rows, in neighbouring columns those of a chunk's low and high digits.
struct IntegerSums {
  int even[4], odd[4];
  DEVICE IntegerSums(int begin) : even{0, 0, 0, 0}, odd{begin, 0, begin, 0} {}
  // Two neighbouring chunks of an octet at ``place``, of x ``mine`` in this thread's column for the
  // first or second of them.
  DEVICE void add(u32 place, int pair, const uint2& mine, bool first, bool second) {
    const int lane = threadIdx.x & 31;
    u32 w[4];
    ldmatrix(w, place + (lane & 15) * 128 + (((pair * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 mask = i ? 0xF0F0F0F0u : 0x0F0F0F0Fu, x = i ? mine.y : mine.x;
      mma_digits(i ? odd : even, w[0] & mask, w[1] & mask, w[2] & mask, w[3] & mask, first ? x : 0,
                 second ? x : 0);
    }
  }
  // Of this thread's two columns, in its lower (0) or upper row.
  DEVICE float of_row(int half) const {
    const int low = even[2 * half] * 16 + odd[2 * half];
    const int high = even[2 * half + 1] * 16 + odd[2 * half + 1];
    return (float)(high * 256 + low);
  }
};
