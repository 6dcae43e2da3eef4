// Rows of quantized_rows.cu in digits, for blocks of at most four slots of int4 in groups of 128: the
// integer units multiply, nibbles need a mask and no shift, a product takes twice as many columns.
//
// In a group a slot's x is unit * X, X = 256 * high + low of 15 bits, high and low of eight, and unit a
// power of two that its largest number decides: what is 2^-7 times that or more loses nothing. Weights
// are the unsigned nibbles, those of even columns as they are and of odd ones 16 times that. Sums are 16
// times what they stand for, and exact. A product's eight columns are both digits of four slots.

constexpr int FEW_SLOTS = 4;
constexpr bool DIGITS = ELEMENT == INT4 && NT == 1 && !LONE && ALIGNED && GROUP_CHUNKS == 4;
constexpr int GROUP_PAIRS = 2, GROUPS = (PAIRS + 1) / 2;  // of a warp

// This warp's columns of x, for a stretch.
struct DigitRows {
  static constexpr int split = 1;
  u32 x[2 * PAIRS][2];         // of a chunk's even columns, and odd ones; this thread's digit
  int begins[GROUPS];          // where sums of the slot that this thread has begin: less zero points
  float units[GROUPS];         // of those
  float4* others;              // not needed
  int known = -1, lead, slot;  // of the block that comes next

  DEVICE void look(const Place& p, const Arguments& a, int block) {
    known = block;
    lead = slot_of(a, block, 0);
    slot = slot_of(a, block, p.g / 2);
  }
  // ``end``: of this program's stretches.
  DEVICE void load(const Place& p, const Arguments& a, int stretch, int end) {
    if (stretch / PARTS != known) look(p, a, stretch / PARTS);
    // Places without a slot take the block's first, whose sums they then throw away.
    int own = slot < 0 || slot >= a.R ? lead : slot;
    own = min(max(own, 0), a.R - 1);
    const u16* from = a.x + (i64)(own / TOP_K) * a.stride_x +
                      (stretch % PARTS * COLUMNS + p.k_begin * STEP_COLS + p.t * 8);
    uint4 loaded[2 * PAIRS];
#pragma unroll
    for (int c = 0; c < 2 * PAIRS; c++) {
      const bool inside = c / 2 < FEWEST || p.k_begin + c / 2 < p.k_end;
      loaded[c] = inside ? *(const uint4*)(from + c * CHUNK_COLS) : make_uint4(0, 0, 0, 0);
    }
    const int next = stretch + 1;
    if (next < end && next / PARTS != known) look(p, a, next / PARTS);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) make(p, loaded, group);
  }
  DEVICE void make(const Place& p, const uint4 (&loaded)[2 * PAIRS], int group) {
    constexpr int CHUNKS = 2 * GROUP_PAIRS;
    const int first = group * CHUNKS, digit = p.g & 1;
    u32 most = 0;
#pragma unroll
    for (int c = first; c < first + CHUNKS && c < 2 * PAIRS; c++) {
      const u32 words[4] = {loaded[c].x, loaded[c].y, loaded[c].z, loaded[c].w};
#pragma unroll
      for (int j = 0; j < 4; j++) most = larger2(most, words[j] & 0x7FFF7FFFu);
    }
    int exponent = (int)max(most & 0xFFFFu, most >> 16);
    exponent = max(exponent, from_thread(exponent, 1));
    exponent = max(exponent, from_thread(exponent, 2)) >> 7;  // of what is no number, 255
    const int raised = max(exponent, 18);                     // so that a unit is one
    const float inverse = as_float((u32)(267 - raised) << 23);
    // The last bits of such a sum are a whole number; the high digit's is rounded in its low one.
    const float whole = digit ? 0x1.8p23f + 128.0f : 0x1.8p23f;
    const u32 own = digit ? 0x0051u : 0x0040u;  // byte 0 or 1 of two words
#pragma unroll
    for (int c = first; c < first + CHUNKS && c < 2 * PAIRS; c++) {
      const u32 words[4] = {loaded[c].x, loaded[c].y, loaded[c].z, loaded[c].w};
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        u32 y[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float number = as_float(odd ? words[j] & 0xFFFF0000u : words[j] << 16);
          y[j] = __float_as_uint(fmaf(number, inverse, whole));
        }
        const u32 low = __byte_perm(y[0], y[1], own), high = __byte_perm(y[2], y[3], own);
        x[c][odd] = __byte_perm(low, high, 0x5410);
      }
    }
    int sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int c = first; c < first + CHUNKS && c < 2 * PAIRS; c += 2) {
      const u32 zero = 0x80808080u;  // the zero point, 16 times
#pragma unroll
      for (int odd = 0; odd < 2; odd++)
        mma_digits(sums, zero, zero, zero, zero, x[c][odd], x[c + 1][odd]);
    }
    begins[group] = -(sums[1] * 256 + sums[0]);
    const u32 unit = exponent == 255 ? 0x7FC00000u : (u32)(raised - 17) << 23;
    units[group] = as_float((u32)from_lane((int)unit, p.t * 8));
  }
  // Of this thread's sums; 8: none.
  static DEVICE int column(const Place& p, int i) { return i ? 8 : p.t; }

  // The products of this warp's part of a tile of 16 rows, scales of two of them; without UNIT.
  DEVICE void multiply(float (&acc)[NT][4], const Place& p, u32 place, int row,
                       const u32 (&scales)[2]) const {
    int even[4], odd[4];
    u32 w[4], v[4];
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      if (i >= FEWEST && p.k_begin + i >= p.k_end) break;
      const int group = i / GROUP_PAIRS;
      if (i % GROUP_PAIRS == 0) {
        even[0] = even[1] = even[2] = even[3] = odd[1] = odd[3] = 0;
        odd[0] = odd[2] = begins[group];
      }
      ldmatrix(w, chunk_at(p, place, row, 2 * i));
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = w[j] & 0x0F0F0F0Fu;
      mma_digits(even, v[0], v[1], v[2], v[3], x[2 * i][0], x[2 * i + 1][0]);
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = w[j] & 0xF0F0F0F0u;
      mma_digits(odd, v[0], v[1], v[2], v[3], x[2 * i][1], x[2 * i + 1][1]);
      const bool last = i + 1 >= FEWEST && p.k_begin + i + 1 >= p.k_end;
      if ((i + 1) % GROUP_PAIRS && !last) continue;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32 at = scales[half] + (first_group(p.k_begin) + group) * SCALE_BYTES;
        const int low = even[2 * half] * 16 + odd[2 * half];
        const int high = even[2 * half + 1] * 16 + odd[2 * half + 1];
        float& sum = acc[0][2 * half];
        sum = fmaf(stored_scale(at) * units[group], (float)(high * 256 + low), sum);
      }
    }
    acc[0][0] *= 1.0f / UNIT;
    acc[0][2] *= 1.0f / UNIT;
  }
};

// Whether this program takes rows in digits: where all of its blocks are that small.
DEVICE bool takes_digits(const Place& p, const Arguments& a, int stretches) {
  const int first = first_item(stretches, blockIdx.x), last = first_item(stretches, blockIdx.x + 1);
  bool larger = false;
  for (int i = first / TILES + p.lane; i < (last + TILES - 1) / TILES; i += 32) {
    const int slot = slot_of(a, i / PARTS, FEW_SLOTS);
    larger |= slot >= 0 && slot < a.R;
  }
  return lanes_with(larger) == 0;
}
