// The epilogue's formulas, as kernels/triton/activation.py has them. FORMULA: none, silu, gelu,
// gelu_tanh, relu2, swigluoai, swiglustep, situ. LIMITED: there is a clamp. NaN stays NaN. And where
// their numbers go.

DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
DEVICE float least(float x, float limit) { return x > limit ? limit : x; }
DEVICE float within(float x, float limit) { return x < -limit ? -limit : least(x, limit); }

DEVICE float plain(float x) {
  if (FORMULA == 1) return x * sigmoid(x);
  if (FORMULA == 2) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if (FORMULA == 3)
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  if (FORMULA == 4) {
    const float positive = x < 0.0f ? 0.0f : x;
    return positive * positive;
  }
  return x;
}

DEVICE float gated(float gate, float up, float limit, float alpha, float beta) {
  if (FORMULA == 7) {
    if (beta != 0.0f) up = beta * tanhf(up / beta);
    return alpha * tanhf(gate / alpha) * sigmoid(gate) * up;
  }
  if (FORMULA == 6) return least(gate * sigmoid(gate), limit) * within(up, limit);
  if (LIMITED) {
    gate = least(gate, limit);
    up = within(up, limit);
  }
  if (FORMULA == 5) return (up + beta) * gate * sigmoid(alpha * gate);
  return plain(gate) * up;
}

// Feature f of a slot's row of out, made of gate and up; or (not GATED) f and the eighth after it.
template <class Launch>
DEVICE void store_features(const Launch& a, int slot, int f, float low, float high) {
  const i64 at = (i64)slot * FEATURES + f;
  if (GATED) {
    store_kept((u16*)a.out + at, float_bf16(gated(low, high, a.limit, a.alpha, a.beta)));
  } else if (WIDE) {
    store_kept((float*)a.out + at, plain(low));
    store_kept((float*)a.out + at + 8, plain(high));
  } else {
    store_kept((u16*)a.out + at, float_bf16(plain(low)));
    store_kept((u16*)a.out + at + 8, float_bf16(plain(high)));
  }
}
