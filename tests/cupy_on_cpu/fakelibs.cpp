// The public entry points of cuBLAS and cuRAND that CuPy calls, on a CPU.  Matrices are stored
// column by column.  The random numbers have cuRAND's laws, not its values.
#include <complex>
#include <cstdio>
#include <random>
#include <vector>

#include "fakecuda.h"

// ---------------------------------------------------------------- cuBLAS

namespace {

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };                     // cublasStatus_t
enum { FLOAT = 0, DOUBLE = 1, HALF = 2, COMPLEX = 4, DOUBLE_COMPLEX = 5 };  // cudaDataType
const int COMPUTE_HALF = 64;                                                // cublasComputeType_t
const int CONJUGATE = 2;                                                    // cublasOperation_t

typedef _Float16 half;
typedef std::complex<float> complex;
typedef std::complex<double> double_complex;

struct Blas {
  int pointers = 0, math = 0;
  void* stream = nullptr;
};

template <class T>
T conjugate(T v, bool) {
  return v;
}
template <class R>
std::complex<R> conjugate(std::complex<R> v, bool really) {
  return really ? std::conj(v) : v;
}

// c = alpha op(a) op(b) + beta c for op(a) (m, k) and op(b) (k, n), added up in the type A.
template <class T, class A>
void gemm(int ta, int tb, int m, int n, int k, A alpha, const T* a, int lda, const T* b, int ldb,
          A beta, T* c, int ldc) {
  std::vector<A> column(m);
  for (int j = 0; j < n; j++) {
    column.assign(m, A(0));
    for (int p = 0; p < k; p++) {
      const A y =
          conjugate((A)(tb ? b[j + (size_t)p * ldb] : b[p + (size_t)j * ldb]), tb == CONJUGATE);
      if (!ta)
        for (int i = 0; i < m; i++) column[i] += (A)a[i + (size_t)p * lda] * y;
      else
        for (int i = 0; i < m; i++)
          column[i] += conjugate((A)a[p + (size_t)i * lda], ta == CONJUGATE) * y;
    }
    for (int i = 0; i < m; i++) {
      T& out = c[i + (size_t)j * ldc];
      // c is not read if beta is 0: it may hold nan
      out = (T)(beta == A(0) ? alpha * column[i] : alpha * column[i] + beta * (A)out);
    }
  }
}

bool all_on_device(const void* a, const void* b, const void* c) {
  if (on_device(a) && on_device(b) && on_device(c)) return true;
  fprintf(stderr, "fakecuda: cuBLAS got a host pointer\n");
  return false;
}

template <class T, class S, class A>
int typed(int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int lda,
          const void* b, int ldb, const void* beta, void* c, int ldc) {
  gemm<T, A>(ta, tb, m, n, k, (A) * (const S*)alpha, (const T*)a, lda, (const T*)b, ldb,
             (A) * (const S*)beta, (T*)c, ldc);
  return OK;
}

int any_gemm(int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int type,
             int lda, const void* b, int ldb, const void* beta, void* c, int ldc, int compute) {
#define TYPED(T, S, A) typed<T, S, A>(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)
  switch (type) {
    case FLOAT: return TYPED(float, float, float);
    case DOUBLE: return TYPED(double, double, double);
    case HALF:
      return compute == COMPUTE_HALF ? TYPED(half, half, float) : TYPED(half, float, float);
    case COMPLEX: return TYPED(complex, complex, complex);
    case DOUBLE_COMPLEX: return TYPED(double_complex, double_complex, double_complex);
  }
#undef TYPED
  fprintf(stderr, "fakecuda: no matrix product of cudaDataType %d\n", type);
  return NOT_SUPPORTED;
}

size_t size_of(int type) {
  return type == HALF ? 2 : type == FLOAT ? 4 : type == DOUBLE_COMPLEX ? 16 : 8;
}

template <class T>
int give(T* out, T value) {
  *out = value;
  return OK;
}

int set(int& where, int value) {
  where = value;
  return OK;
}

}  // namespace

EXPORT int cublasCreate_v2(void** h) { return give(h, (void*)new Blas); }
EXPORT int cublasDestroy_v2(void* h) {
  delete (Blas*)h;
  return OK;
}
EXPORT int cublasGetVersion_v2(void*, int* v) { return give(v, 130200); }
EXPORT int cublasSetStream_v2(void* h, void* stream) { return give(&((Blas*)h)->stream, stream); }
EXPORT int cublasGetStream_v2(void* h, void** stream) { return give(stream, ((Blas*)h)->stream); }
EXPORT int cublasSetPointerMode_v2(void* h, int mode) { return set(((Blas*)h)->pointers, mode); }
EXPORT int cublasGetPointerMode_v2(void* h, int* mode) { return give(mode, ((Blas*)h)->pointers); }
EXPORT int cublasSetMathMode(void* h, int mode) { return set(((Blas*)h)->math, mode); }
EXPORT int cublasGetMathMode(void* h, int* mode) { return give(mode, ((Blas*)h)->math); }

#define GEMM(L, T)                                                                                 \
  EXPORT int cublas##L##gemm_v2(void*, int ta, int tb, int m, int n, int k, const T* alpha,        \
                                const T* a, int lda, const T* b, int ldb, const T* beta, T* c,     \
                                int ldc) {                                                         \
    if (!all_on_device(a, b, c)) return INVALID_VALUE;                                             \
    gemm<T, T>(ta, tb, m, n, k, *alpha, a, lda, b, ldb, *beta, c, ldc);                            \
    return OK;                                                                                     \
  }                                                                                                \
  EXPORT int cublas##L##gemmStridedBatched(void*, int ta, int tb, int m, int n, int k,             \
                                           const T* alpha, const T* a, int lda, long long sa,      \
                                           const T* b, int ldb, long long sb, const T* beta, T* c, \
                                           int ldc, long long sc, int count) {                     \
    if (!all_on_device(a, b, c)) return INVALID_VALUE;                                             \
    for (int i = 0; i < count; i++)                                                                \
      gemm<T, T>(ta, tb, m, n, k, *alpha, a + i * sa, lda, b + i * sb, ldb, *beta, c + i * sc,     \
                 ldc);                                                                             \
    return OK;                                                                                     \
  }                                                                                                \
  EXPORT int cublas##L##gemmBatched(void*, int ta, int tb, int m, int n, int k, const T* alpha,    \
                                    const T** a, int lda, const T** b, int ldb, const T* beta,     \
                                    T** c, int ldc, int count) {                                   \
    for (int i = 0; i < count; i++)                                                                \
      gemm<T, T>(ta, tb, m, n, k, *alpha, a[i], lda, b[i], ldb, *beta, c[i], ldc);                 \
    return OK;                                                                                     \
  }

// c = alpha op(a) + beta op(b), where a factor of 0 leaves its matrix unread
#define GEAM(L, T)                                                                            \
  EXPORT int cublas##L##geam(void*, int ta, int tb, int m, int n, const T* alpha, const T* a, \
                             int lda, const T* beta, const T* b, int ldb, T* c, int ldc) {    \
    if (!on_device(c)) return INVALID_VALUE;                                                  \
    for (int j = 0; j < n; j++)                                                               \
      for (int i = 0; i < m; i++) {                                                           \
        const size_t x = ta ? j + (size_t)i * lda : i + (size_t)j * lda;                      \
        const size_t y = tb ? j + (size_t)i * ldb : i + (size_t)j * ldb;                      \
        T out = T(0);                                                                         \
        if (*alpha != T(0)) out += *alpha * conjugate(a[x], ta == CONJUGATE);                 \
        if (*beta != T(0)) out += *beta * conjugate(b[y], tb == CONJUGATE);                   \
        c[i + (size_t)j * ldc] = out;                                                         \
      }                                                                                       \
    return OK;                                                                                \
  }

// clang-format off
GEMM(S, float)
GEMM(D, double)
GEMM(C, complex)
GEMM(Z, double_complex)
GEAM(S, float)
GEAM(D, double)
GEAM(C, complex)
GEAM(Z, double_complex)
// clang-format on

EXPORT int cublasGemmEx(void*, int ta, int tb, int m, int n, int k, const void* alpha,
                        const void* a, int type, int lda, const void* b, int, int ldb,
                        const void* beta, void* c, int, int ldc, int compute, int) {
  if (!all_on_device(a, b, c)) return INVALID_VALUE;
  return any_gemm(ta, tb, m, n, k, alpha, a, type, lda, b, ldb, beta, c, ldc, compute);
}
EXPORT int cublasSgemmEx(void*, int ta, int tb, int m, int n, int k, const float* alpha,
                         const void* a, int type, int lda, const void* b, int, int ldb,
                         const float* beta, void* c, int, int ldc) {
  if (!all_on_device(a, b, c)) return INVALID_VALUE;
  return any_gemm(ta, tb, m, n, k, alpha, a, type, lda, b, ldb, beta, c, ldc, -1);
}
EXPORT int cublasGemmStridedBatchedEx(void*, int ta, int tb, int m, int n, int k, const void* alpha,
                                      const void* a, int type, int lda, long long sa, const void* b,
                                      int, int ldb, long long sb, const void* beta, void* c, int,
                                      int ldc, long long sc, int count, int compute, int) {
  if (!all_on_device(a, b, c)) return INVALID_VALUE;
  const size_t size = size_of(type);
  int status = OK;
  for (int i = 0; i < count && status == OK; i++)
    status =
        any_gemm(ta, tb, m, n, k, alpha, (const char*)a + i * sa * size, type, lda,
                 (const char*)b + i * sb * size, ldb, beta, (char*)c + i * sc * size, ldc, compute);
  return status;
}

// ---------------------------------------------------------------- cuRAND

namespace {

const int ODD_LENGTH = 105;  // CURAND_STATUS_LENGTH_NOT_MULTIPLE

typedef std::mt19937_64 Stream;

template <class T, class Draw>
int fill(void* generator, T* out, size_t n, Draw draw) {
  for (size_t i = 0; i < n; i++) out[i] = (T)draw(*(Stream*)generator);
  return OK;
}

template <class T>
int uniform(void* generator, T* out, size_t n) {  // cuRAND's includes 1 and excludes 0
  std::uniform_real_distribution<T> law;
  return fill(generator, out, n, [&](Stream& r) { return T(1) - law(r); });
}

template <class T>
int normal(void* generator, T* out, size_t n, T mean, T std) {
  if (n % 2) return ODD_LENGTH;
  std::normal_distribution<T> law(mean, std);
  return fill(generator, out, n, law);
}

template <class T>
int log_normal(void* generator, T* out, size_t n, T mean, T std) {
  std::lognormal_distribution<T> law(mean, std);
  return fill(generator, out, n, law);
}

}  // namespace

EXPORT int curandCreateGenerator(void** g, int) { return give(g, (void*)new Stream); }
EXPORT int curandDestroyGenerator(void* g) {
  delete (Stream*)g;
  return OK;
}
EXPORT int curandSetPseudoRandomGeneratorSeed(void* g, unsigned long long seed) {
  ((Stream*)g)->seed(seed);
  return OK;
}
EXPORT int curandSetGeneratorOffset(void* g, unsigned long long n) {
  ((Stream*)g)->discard(n);
  return OK;
}
EXPORT int curandSetGeneratorOrdering(void*, int) { return OK; }
EXPORT int curandSetStream(void*, void*) { return OK; }
EXPORT int curandGetVersion(int* v) { return give(v, 10400); }
EXPORT int curandGenerate(void* g, unsigned* out, size_t n) {
  return fill(g, out, n, [](Stream& r) { return r(); });
}
EXPORT int curandGenerateLongLong(void* g, unsigned long long* out, size_t n) {
  return fill(g, out, n, [](Stream& r) { return r(); });
}
EXPORT int curandGenerateUniform(void* g, float* out, size_t n) { return uniform(g, out, n); }
EXPORT int curandGenerateUniformDouble(void* g, double* out, size_t n) {
  return uniform(g, out, n);
}
EXPORT int curandGenerateNormal(void* g, float* out, size_t n, float mean, float std) {
  return normal(g, out, n, mean, std);
}
EXPORT int curandGenerateNormalDouble(void* g, double* out, size_t n, double mean, double std) {
  return normal(g, out, n, mean, std);
}
EXPORT int curandGenerateLogNormal(void* g, float* out, size_t n, float mean, float std) {
  return log_normal(g, out, n, mean, std);
}
EXPORT int curandGenerateLogNormalDouble(void* g, double* out, size_t n, double mean, double std) {
  return log_normal(g, out, n, mean, std);
}
EXPORT int curandGeneratePoisson(void* g, unsigned* out, size_t n, double mean) {
  std::poisson_distribution<unsigned> law(mean);
  return fill(g, out, n, law);
}
