// Vectors of 16 floats in AVX-512 (F, BW, VL, DQ), and its own bfloat16 conversion where it has one.
#pragma once

namespace fused_res::cpu::FUSED_RES_VARIANT {

struct Avx512Vec {
  static constexpr int width = 16;

  __m512 v;

  static Avx512Vec set(float a) { return {_mm512_set1_ps(a)}; }

  static Avx512Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  template <class T>
  static Avx512Vec load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
  }

  static Avx512Vec load_part(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  template <class T>
  static Avx512Vec load_part(const T* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
  }

  Avx512Vec store(float* p) const {
    _mm512_storeu_ps(p, v);
    return *this;
  }
  Avx512Vec store_part(float* p, int n) const {
    _mm512_mask_storeu_ps(p, first(n), v);
    return *this;
  }
  template <class T>
  Avx512Vec store(T* p) const {
    const __m256i shorts = narrow(T{});
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), shorts);
    return widen(shorts, T{});
  }
  template <class T>
  Avx512Vec store_part(T* p, int n) const {
    const __m256i shorts = narrow(T{});
    _mm256_mask_storeu_epi16(p, first(n), shorts);
    return widen(shorts, T{});
  }

  // Lanes where the ReLU lets the gradient pass: those of NaN do.
  uint32_t open() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }

  // The second operand is taken where one is NaN.
  Avx512Vec relu() const { return {_mm512_max_ps(_mm512_setzero_ps(), v)}; }

  Avx512Vec keep(uint32_t bits) const { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v)}; }

 private:
  static constexpr int kNan = 0x81, kSubnormal = 0x20;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static Avx512Vec widen(__m256i shorts, half) { return {_mm512_cvtph_ps(shorts)}; }
  static Avx512Vec widen(__m256i shorts, bfloat16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(shorts), 16))};
  }

  __m256i narrow(half) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m256i narrow(bfloat16) const {
#if defined(__AVX512BF16__)
    // The instruction takes subnormal numbers for 0 and keeps what a NaN says: where there is one, the long way.
    if (_mm512_fpclass_ps_mask(v, kNan | kSubnormal) == 0) {
      return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
    }
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), is_nan, _mm512_set1_epi32(0x7FC0));
    return _mm512_cvtepi32_epi16(words);
  }
};

inline Avx512Vec operator+(Avx512Vec a, Avx512Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Avx512Vec operator-(Avx512Vec a, Avx512Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Avx512Vec operator*(Avx512Vec a, Avx512Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Avx512Vec fma(Avx512Vec a, Avx512Vec b, Avx512Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// NaN where either is.
inline Avx512Vec larger(Avx512Vec a, Avx512Vec b) {
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}

// Lane j of vector i becomes lane i of vector j. Each step exchanges what lies across from twice as far away.
inline void transpose(Avx512Vec (&v)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88), odd = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xDD);
    const __m512 even2 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xDD);
    v[j].v = _mm512_shuffle_f32x4(even, even2, 0x88);
    v[j + 4].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    v[j + 8].v = _mm512_shuffle_f32x4(even, even2, 0xDD);
    v[j + 12].v = _mm512_shuffle_f32x4(odd, odd2, 0xDD);
  }
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
