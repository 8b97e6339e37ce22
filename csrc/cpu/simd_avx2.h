// Vectors of 8 floats in AVX2, FMA and F16C.
#pragma once

namespace fused_res::cpu::FUSED_RES_VARIANT {

struct Avx2Vec {
  static constexpr int width = 8;

  __m256 v;

  static Avx2Vec set(float a) { return {_mm256_set1_ps(a)}; }

  static Avx2Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Avx2Vec load(const half* p) { return widen(load_shorts(p), half{}); }
  static Avx2Vec load(const bfloat16* p) { return widen(load_shorts(p), bfloat16{}); }

  template <class T>
  static Avx2Vec load_part(const T* p, int n) {
    T lanes[width] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
  }

  Avx2Vec store(float* p) const {
    _mm256_storeu_ps(p, v);
    return *this;
  }
  template <class T>
  Avx2Vec store(T* p) const {
    const __m128i shorts = narrow(T{});
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), shorts);
    return widen(shorts, T{});
  }
  template <class T>
  Avx2Vec store_part(T* p, int n) const {
    T lanes[width];
    const Avx2Vec rounded = store(lanes);
    std::memcpy(p, lanes, n * sizeof(T));
    return rounded;
  }

  // Lanes where the ReLU lets the gradient pass: those of NaN do.
  uint32_t open() const { return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)); }

  // The second operand is taken where one is NaN.
  Avx2Vec relu() const { return {_mm256_max_ps(_mm256_setzero_ps(), v)}; }

  Avx2Vec keep(uint32_t bits) const {
    const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), places);
    return {_mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, places)))};
  }

 private:
  static __m128i load_shorts(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  static Avx2Vec widen(__m128i shorts, half) { return {_mm256_cvtph_ps(shorts)}; }
  static Avx2Vec widen(__m128i shorts, bfloat16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16))};
  }

  __m128i narrow(half) const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m128i narrow(bfloat16) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};

inline Avx2Vec operator+(Avx2Vec a, Avx2Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Avx2Vec operator-(Avx2Vec a, Avx2Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Avx2Vec operator*(Avx2Vec a, Avx2Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Avx2Vec fma(Avx2Vec a, Avx2Vec b, Avx2Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// NaN where either is.
inline Avx2Vec larger(Avx2Vec a, Avx2Vec b) {
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}

}  // namespace fused_res::cpu::FUSED_RES_VARIANT
