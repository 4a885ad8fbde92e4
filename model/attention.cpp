// Causal attention for head_dim 4 on AVX-512 CPUs, float32, forward and backward.
// With 4 numbers a head the work is bound by FMA slots (8 a pair of query and key, and the exp), so
// the kernels keep 16 pairs in the lanes of one register and never do a horizontal reduction:
// forward has 16 queries in the lanes, backward 16 keys; the other side is read by broadcast loads.
// Build: -O3 -march=native (needs AVX-512F/DQ).
#include <immintrin.h>
#include <torch/library.h>
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <cmath>
#include <vector>
using at::Tensor;
using V = __m512;
constexpr float kScale = 0.5f, kLog2e = 1.44269504f, kLn2 = 0.69314718f;
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V bc(float x) { return _mm512_set1_ps(x); }

// One (batch, head) slice: rows of 4 floats, `st` floats apart.
struct Rows { float* p; int64_t st; __m128 operator[](int64_t t) const { return _mm_loadu_ps(p + t * st); } };
static Rows rows(const Tensor& x, int64_t bh) {
  int64_t H = x.size(1);
  return {x.data_ptr<float>() + bh / H * x.stride(0) + bh % H * x.stride(1), x.stride(2)};
}
// 4x4 transpose inside each 128-bit group; turns "group g of a[m] = row 4g+m" into
// "lane i of a[c] = component c of row i" and back.
static inline void transpose4(V a[4]) {
  V l0 = _mm512_unpacklo_ps(a[0], a[1]), l1 = _mm512_unpacklo_ps(a[2], a[3]);
  V h0 = _mm512_unpackhi_ps(a[0], a[1]), h1 = _mm512_unpackhi_ps(a[2], a[3]);
  a[0] = _mm512_shuffle_ps(l0, l1, 0x44); a[1] = _mm512_shuffle_ps(l0, l1, 0xEE);
  a[2] = _mm512_shuffle_ps(h0, h1, 0x44); a[3] = _mm512_shuffle_ps(h0, h1, 0xEE);
}
// Rows i..i+15 (past the end: the last row again; causality or the store discards those lanes).
static inline void load16(Rows r, int64_t i, int64_t T, V a[4]) {
  auto at = [&](int64_t t) { return r[std::min(t, T - 1)]; };
  for (int m = 0; m < 4; m++) {
    V x = _mm512_castps128_ps512(at(i + m));
    x = _mm512_insertf32x4(x, at(i + m + 4), 1); x = _mm512_insertf32x4(x, at(i + m + 8), 2);
    a[m] = _mm512_insertf32x4(x, at(i + m + 12), 3);
  }
}
static inline void store16(Rows r, int64_t i, int64_t T, V a[4]) {
  transpose4(a);
  alignas(64) float buf[4][16];
  for (int m = 0; m < 4; m++) _mm512_store_ps(buf[m], a[m]);
  for (int64_t t = i; t < std::min(i + 16, T); t++)
    _mm_storeu_ps(r.p + t * r.st, _mm_load_ps(&buf[(t - i) % 4][(t - i) / 4 * 4]));
}

// 2^x. Adding 1.5*2^19 rounds x to a multiple k/16, k in the low bits of t. 2^(k/16) is then a table of
// 16 (one vpermps) plus k/16 added to the exponent, and 2^f for |f|<=1/32 needs only a quadratic
// (4e-7): 3 slots of the busy FMA pipes instead of 5 for a plain polynomial; the rest run elsewhere.
// Valid for |x| < 126. Table entry j has j<<19 taken off, as t<<19 puts it back.
struct Exp2 {
  V magic = bc(786432.f), c1 = bc(0.693125f), c2 = bc(0.240227f), table;
  Exp2() {
    alignas(64) uint32_t e[16];
    for (uint32_t j = 0; j < 16; j++) { float f = exp2f(j / 16.f); memcpy(&e[j], &f, 4); e[j] -= j << 19; }
    table = _mm512_load_ps(e);
    const double h = std::log(2.0) / 32;  // minimax: x^3/6 ~ h^2/8 x on [-h, h]
    c1 = bc(float(std::log(2.0) * (1 + h * h / 8)));
  }
  V operator()(V x) const {
    V t = _mm512_add_ps(x, magic), f = _mm512_sub_ps(x, _mm512_sub_ps(t, magic));
    __m512i k = _mm512_castps_si512(t);
    V s = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(_mm512_permutexvar_ps(k, table)), _mm512_slli_epi32(k, 19)));
    return fma(_mm512_mul_ps(s, f), fma(c2, f, c1), s);
  }
};
// x = shifted score. Heads whose scores may leave +-50 (SAFE) clamp what would underflow to about 0.
template <bool SAFE> static inline V score(const V a[4], const float* b, V shift) {
  // Two halves: a shorter chain than four FMAs, and the add runs outside the FMA pipes.
  V x = _mm512_add_ps(fma(a[1], bc(b[1]), _mm512_mul_ps(a[0], bc(b[0]))), fma(a[3], bc(b[3]), fma(a[2], bc(b[2]), shift)));
  return SAFE ? _mm512_max_ps(bc(-120.f), x) : x;  // this operand order keeps NaN
}
// Bound on |score| (base 2) of a head: sum over c of max|q_c| max|k_c|. Below 50 no shift is needed:
// sums stay in float's range, which saves a pass for the row maximum.
static bool large_scores(Rows q, Rows k, int64_t T) {
  __m128 mq = _mm_setzero_ps(), mk = mq, sign = _mm_set1_ps(-0.f);
  for (int64_t t = 0; t < T; t++) {
    mq = _mm_max_ps(mq, _mm_andnot_ps(sign, q[t])); mk = _mm_max_ps(mk, _mm_andnot_ps(sign, k[t]));
  }
  return !(_mm_cvtss_f32(_mm_dp_ps(mq, mk, 0xF1)) * kScale * kLog2e < 50);
}

// stats of a row: the shift m and 1/sum_j 2^(s_j - m), which backward needs (no log to compute).
template <bool SAFE> static void forward_head(Rows q, Rows k, Rows v, Rows o, float* shift, float* inv, int64_t T, float* kv) {
  const Exp2 ex;
  for (int64_t t = 0; t < T; t++) { _mm_storeu_ps(kv + 8 * t, k[t]); _mm_storeu_ps(kv + 8 * t + 4, v[t]); }
  for (int64_t i = 0; i < T; i += 16) {
    V a[4], acc[4] = {}, sum = {}, m = {};
    load16(q, i, T, a); transpose4(a);
    for (V& x : a) x = _mm512_mul_ps(x, bc(kScale * kLog2e));
    int64_t end = std::min(i + 16, T);
    auto causal = [&](int64_t j) { return __mmask16(j < i ? 0xFFFF : 0xFFFF << (j - i)); };
    if (SAFE) {
      m = bc(-INFINITY);
      for (int64_t j = 0; j < end; j++) m = _mm512_mask_max_ps(m, causal(j), m, score<false>(a, kv + 8 * j, V{}));
      m = -m;
    }
    // Pipelined two keys ahead, as in backward; kv has two spare rows for that.
    V p = ex(score<SAFE>(a, kv, m)), x = score<SAFE>(a, kv + 8, m);
    auto step = [&](const float* r, __mmask16 live) __attribute__((always_inline)) {
      V xn = score<SAFE>(a, r + 16, m), pn = ex(x);
      if (live != 0xFFFF) p = _mm512_maskz_mov_ps(live, p);
      sum = _mm512_add_ps(sum, p);
      for (int c = 0; c < 4; c++) acc[c] = fma(p, bc(r[4 + c]), acc[c]);
      p = pn; x = xn;
    };
    int64_t j = 0;
    for (; j < i; j++) step(kv + 8 * j, 0xFFFF);
    for (; j < end; j++) step(kv + 8 * j, causal(j));
    V r = _mm512_div_ps(bc(1), sum);
    for (V& x : acc) x = _mm512_mul_ps(x, r);
    store16(o, i, T, acc);
    __mmask16 live = (1u << (end - i)) - 1;
    _mm512_mask_storeu_ps(shift + i, live, m); _mm512_mask_storeu_ps(inv + i, live, r);
  }
}

// With P = softmax: dv = P'do, dS = P (do v' - delta), dq = dS k, dk = dS'q, all from one exp a pair.
template <bool SAFE> static void backward_head(Rows go, Rows q, Rows k, Rows v, Rows o, const float* shift, const float* inv,
    Rows dq, Rows dk, Rows dv, int64_t T, float* qd, float* dqa) {
  const Exp2 ex;
  // A row for each query: scaled q, do/sum (so that P need not be normalised), -delta/sum, -shift.
  for (int64_t t = 0; t < T; t++) {
    float* r = qd + 12 * t;
    __m128 g = _mm_mul_ps(go[t], _mm_set1_ps(inv[t]));
    _mm_storeu_ps(r, _mm_mul_ps(q[t], _mm_set1_ps(kScale * kLog2e))); _mm_storeu_ps(r + 4, g);
    r[8] = -_mm_cvtss_f32(_mm_dp_ps(g, o[t], 0xF1)); r[9] = shift[t];
    _mm512_storeu_ps(dqa + 16 * t, V{});
  }
  for (int64_t j = 0; j < T; j += 16) {
    V kr[4], a[4], b[4], ak[4] = {}, av[4] = {};
    load16(k, j, T, kr); load16(v, j, T, b); transpose4(b);
    for (int c = 0; c < 4; c++) a[c] = kr[c];
    transpose4(a);
    // Software pipeline: the score of row i+2 and the exp of row i+1 are issued beside the sums of row i, as
    // one row's dependency chain (65 cycles) is too long for the CPU's scheduler to overlap by itself.
    const float* r0 = qd + 12 * j;
    V p = ex(score<SAFE>(a, r0, bc(r0[9]))), x = score<SAFE>(a, r0 + 12, bc(r0[12 + 9]));
    auto step = [&](int64_t i, __mmask16 live) __attribute__((always_inline)) {
      const float* r = qd + 12 * i;
      V xn = score<SAFE>(a, r + 24, bc(r[24 + 9])), pn = ex(x);
      if (live != 0xFFFF) p = _mm512_maskz_mov_ps(live, p);
      V ds = _mm512_mul_ps(p, score<false>(b, r + 4, bc(r[8])));
      for (int c = 0; c < 4; c++) { av[c] = fma(p, bc(r[4 + c]), av[c]); ak[c] = fma(ds, bc(r[c]), ak[c]); }
      // dq sums over lanes: group g of d collects keys 4g..4g+3; the 4 groups are added once, at the end.
      V d = _mm512_loadu_ps(dqa + 16 * i);
      d = fma(_mm512_permute_ps(ds, 0x00), kr[0], d); d = fma(_mm512_permute_ps(ds, 0x55), kr[1], d);
      d = fma(_mm512_permute_ps(ds, 0xAA), kr[2], d); d = fma(_mm512_permute_ps(ds, 0xFF), kr[3], d);
      _mm512_storeu_ps(dqa + 16 * i, d);
      p = pn; x = xn;
    };
    int64_t i = j;
    for (; i < std::min(j + 16, T); i++) step(i, __mmask16((2u << (i - j)) - 1));
    for (; i < T; i++) step(i, 0xFFFF);
    for (V& x : ak) x = _mm512_mul_ps(x, bc(kLn2));  // q in the rows carries scale*log2(e)
    store16(dk, j, T, ak); store16(dv, j, T, av);
  }
  for (int64_t t = 0; t < T; t++) {
    V d = _mm512_loadu_ps(dqa + 16 * t);
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(d), _mm512_extractf32x8_ps(d, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    _mm_storeu_ps(dq.p + t * dq.st, _mm_mul_ps(s, _mm_set1_ps(kScale)));
  }
}

static Tensor ready(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.size(3) == 4 && x.scalar_type() == at::kFloat, "need float32 [B, heads, T, 4]");
  return x.stride(3) == 1 ? x : x.contiguous();
}
// Results are transposed views of [B, T, heads, 4], the layout the projections around attention want.
static Tensor like(const Tensor& q) { return at::empty({q.size(0), q.size(2), q.size(1), 4}, q.options()).transpose(1, 2); }

std::tuple<Tensor, Tensor> forward(const Tensor& q_, const Tensor& k_, const Tensor& v_) {
  Tensor q = ready(q_), k = ready(k_), v = ready(v_), o = like(q);
  int64_t BH = q.size(0) * q.size(1), T = q.size(2);
  TORCH_CHECK(k.sizes() == q.sizes() && v.sizes() == q.sizes(), "q, k, v must have one shape");
  Tensor stats = at::empty({q.size(0), q.size(1), 2, T}, q.options());
  at::parallel_for(0, BH, 1, [&](int64_t b, int64_t e) {
    std::vector<float> kv(8 * T + 16);
    for (int64_t h = b; h < e; h++) {
      float* s = stats.data_ptr<float>() + h * 2 * T;
      Rows Q = rows(q, h), K = rows(k, h);
      auto f = large_scores(Q, K, T) ? forward_head<true> : forward_head<false>;
      f(Q, K, rows(v, h), rows(o, h), s, s + T, T, kv.data());
    }
  });
  return {o, stats};
}
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& do_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& o_, const Tensor& stats) {
  Tensor g = ready(do_), q = ready(q_), k = ready(k_), v = ready(v_), o = ready(o_), dq = like(q), dk = like(q), dv = like(q), st = stats.contiguous();
  int64_t BH = q.size(0) * q.size(1), T = q.size(2);
  at::parallel_for(0, BH, 1, [&](int64_t b, int64_t e) {
    std::vector<float> qd(12 * T + 24), dqa(16 * T);
    for (int64_t h = b; h < e; h++) {
      const float* s = st.data_ptr<float>() + h * 2 * T;
      Rows Q = rows(q, h), K = rows(k, h);
      auto f = large_scores(Q, K, T) ? backward_head<true> : backward_head<false>;
      f(rows(g, h), Q, K, rows(v, h), rows(o, h), s, s + T, rows(dq, h), rows(dk, h), rows(dv, h), T, qd.data(), dqa.data());
    }
  });
  return {dq, dk, dv};
}
TORCH_LIBRARY(tiny_attention, m) {
  m.def("forward(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)");
  m.def("backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(tiny_attention, CPU, m) { m.impl("forward", &forward); m.impl("backward", &backward); }
