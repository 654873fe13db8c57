// CUDA C++ for g++: the built-ins that CuPy's generated kernels use, included before their source.
// fibers.h has those that make the threads of a block wait for one another.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 2
#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
using std::signbit;

// ---------------------------------------------------------------- numbers

// CUDA's min and max take two types, which std's do not.
template <class A, class B>
using Mixed =
    typename std::enable_if<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value &&
                                !std::is_same<A, B>::value,
                            typename std::common_type<A, B>::type>::type;
template <class A, class B>
Mixed<A, B> min(A a, B b) {
  return Mixed<A, B>(a) < Mixed<A, B>(b) ? a : b;
}
template <class A, class B>
Mixed<A, B> max(A a, B b) {
  return Mixed<A, B>(a) > Mixed<A, B>(b) ? a : b;
}

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float rsqrt(float x) { return rsqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline double rcbrt(double x) { return 1.0 / cbrt(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __expf(float x) { return expf(x); }
static inline float __logf(float x) { return logf(x); }
static inline double sinpi(double x) { return sin(M_PI * x); }
static inline float sinpif(float x) { return sinf((float)M_PI * x); }
static inline float sinpi(float x) { return sinpif(x); }
static inline double cospi(double x) { return cos(M_PI * x); }
static inline float cospi(float x) { return cosf((float)M_PI * x); }

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }

template <class To, class From>
static inline To same_bits(From x) {
  To y;
  static_assert(sizeof x == sizeof y, "types of one size");
  memcpy(&y, &x, sizeof y);
  return y;
}
static inline int __float_as_int(float x) { return same_bits<int>(x); }
static inline float __int_as_float(int x) { return same_bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
static inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return same_bits<double>(x); }

// ---------------------------------------------------------------- special functions

static inline double cyl_bessel_i0(double x) { return std::cyl_bessel_i(0.0, fabs(x)); }
static inline float cyl_bessel_i0(float x) { return std::cyl_bessel_if(0.0f, fabsf(x)); }
static inline double cyl_bessel_i1(double x) {
  return copysign(std::cyl_bessel_i(1.0, fabs(x)), x);
}
static inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
static inline float normcdf(float x) { return 0.5f * erfcf(-x * (float)M_SQRT1_2); }
static inline double erfcx(double x) { return exp(x * x) * erfc(x); }

// Winitzki's closed form (2008), good to 2e-3, then Newton's method.
static inline double erfinv(double y) {
  if (!(fabs(y) < 1)) return fabs(y) == 1 ? copysign(INFINITY, y) : NAN;
  const double a = 0.147, log_term = log((1 - y) * (1 + y));
  const double t = 2 / (M_PI * a) + log_term / 2;
  double x = copysign(sqrt(sqrt(t * t - log_term / a) - t), y);
  for (int i = 0; i < 4; i++) x -= (erf(x) - y) / (M_2_SQRTPI * exp(-x * x));
  return x;
}
static inline float erfinv(float y) { return (float)erfinv((double)y); }
static inline double erfcinv(double y) { return erfinv(1 - y); }

// ---------------------------------------------------------------- memory

template <class T>
static inline T __ldg(const T* p) {
  return *p;
}

// One thread runs at a time, so an atomic operation is a plain one.
template <class T>
static inline T replace(T* p, T v) {
  T old = *p;
  *p = v;
  return old;
}
#define ATOMICS(T)                                                             \
  static inline T atomicAdd(T* p, T v) { return replace(p, (T)(*p + v)); }     \
  static inline T atomicMax(T* p, T v) { return replace(p, *p > v ? *p : v); } \
  static inline T atomicMin(T* p, T v) { return replace(p, *p < v ? *p : v); } \
  static inline T atomicExch(T* p, T v) { return replace(p, v); }              \
  static inline T atomicCAS(T* p, T old, T v) { return replace(p, *p == old ? v : *p); }
// clang-format off
ATOMICS(int)
ATOMICS(unsigned)
ATOMICS(unsigned long long)
// clang-format on
static inline float atomicAdd(float* p, float v) { return replace(p, *p + v); }
static inline double atomicAdd(double* p, double v) { return replace(p, *p + v); }
static inline float atomicExch(float* p, float v) { return replace(p, v); }
static inline int atomicSub(int* p, int v) { return replace(p, *p - v); }
static inline unsigned atomicAnd(unsigned* p, unsigned v) { return replace(p, *p & v); }
static inline unsigned atomicOr(unsigned* p, unsigned v) { return replace(p, *p | v); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline long long clock64() { return 0; }

// ---------------------------------------------------------------- running a kernel

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;
static std::vector<char> fake_shared_memory;
static void* fake_shared() { return fake_shared_memory.data(); }

#ifdef FAKE_SYNC
#include "fibers.h"
#else
static void fake_block(void (*kernel)(void**), void** arguments) {
  for (unsigned z = 0; z < blockDim.z; z++)
    for (unsigned y = 0; y < blockDim.y; y++)
      for (unsigned x = 0; x < blockDim.x; x++) {
        threadIdx = {x, y, z};
        kernel(arguments);
      }
}
#endif

extern "C" void fake_run(void (*kernel)(void**), const unsigned* dimensions, size_t shared,
                         void** arguments) {
  gridDim = dim3(dimensions[0], dimensions[1], dimensions[2]);
  blockDim = dim3(dimensions[3], dimensions[4], dimensions[5]);
  fake_shared_memory.resize(shared + 16);
  for (unsigned z = 0; z < gridDim.z; z++)
    for (unsigned y = 0; y < gridDim.y; y++)
      for (unsigned x = 0; x < gridDim.x; x++) {
        blockIdx = {x, y, z};
        fake_block(kernel, arguments);
      }
}

// Call a kernel with arguments that come as pointers, as cuLaunchKernel has them.
template <class... A, size_t... I>
static void fake_call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(typename std::decay<A>::type*)arguments[I]...);
}
template <class... A>
static void fake_call(void (*kernel)(A...), void** arguments) {
  fake_call(kernel, arguments, std::make_index_sequence<sizeof...(A)>());
}
