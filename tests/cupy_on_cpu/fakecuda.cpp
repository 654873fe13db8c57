// The public entry points of the CUDA runtime, driver and NVRTC that CuPy's front end calls, on a
// CPU.  "Device memory" is host memory in a registry, so that each copy can be checked for the side
// its pointers are on; kernels are compiled by g++ (fakecc.py) and run at once, one after another.
#include "fakecuda.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <vector>

// ---------------------------------------------------------------- device memory

namespace {

// In the order in which fakecupy.stats() reads them.
struct Stats {
  long h2d, d2h, d2d, sync, launch, malloc, badcopy;
} stats;

std::recursive_mutex door;  // CuPy lets go of Python's lock while it calls CUDA
using Guard = std::lock_guard<std::recursive_mutex>;

std::map<uintptr_t, size_t> allocations;

const size_t MEMORY = size_t(4) << 30;  // what the device says it has; nothing enforces it
const int WARP = 32, MAX_THREADS = 1024, SHARED = 49152, PROCESSORS = 4;

template <class T>
cudaError_t give(T* out, T value) {
  *out = value;
  return cudaSuccess;
}

cudaError_t wait() {
  Guard guard(door);
  stats.sync++;
  return cudaSuccess;
}

cudaError_t allocate(void** p, size_t size) {
  Guard guard(door);
  if (size == 0) size = 512;
  if (posix_memalign(p, 512, size)) return cudaErrorMemoryAllocation;
  memset(*p, 0xCB, size);  // what cupy.empty returns must not look like zeros
  allocations[(uintptr_t)*p] = size;
  stats.malloc++;
  return cudaSuccess;
}

cudaError_t release(void* p) {
  Guard guard(door);
  if (!p) return cudaSuccess;
  if (!allocations.erase((uintptr_t)p)) return cudaErrorInvalidValue;
  free(p);
  return cudaSuccess;
}

const char* side(bool device) { return device ? "device" : "host"; }

cudaError_t copy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  Guard guard(door);
  const bool to_device = on_device(to), from_device = on_device(from);
  const bool wrong = (kind == cudaMemcpyHostToDevice && (!to_device || from_device)) ||
                     (kind == cudaMemcpyDeviceToHost && (to_device || !from_device)) ||
                     (kind == cudaMemcpyDeviceToDevice && !(to_device && from_device));
  if (wrong) {
    stats.badcopy++;
    fprintf(stderr, "fakecuda: a copy of kind %d goes from the %s to the %s\n", (int)kind,
            side(from_device), side(to_device));
    return cudaErrorInvalidValue;
  }
  memmove(to, from, size);
  ++(to_device && from_device ? stats.d2d : to_device ? stats.h2d : stats.d2h);
  return cudaSuccess;
}

// A stream or an event: everything is done when the call returns, so only the address matters.
template <class T>
cudaError_t create(T* handle) {
  return give(handle, (T)malloc(1));
}

cudaError_t destroy(void* handle) {
  free(handle);
  return cudaSuccess;
}

}  // namespace

bool on_device(const void* p) {
  Guard guard(door);
  auto after = allocations.upper_bound((uintptr_t)p);
  if (after == allocations.begin()) return false;
  auto [start, size] = *std::prev(after);
  return (uintptr_t)p < start + size;
}

EXPORT const long* fakecuda_stats() { return &stats.h2d; }

// ---------------------------------------------------------------- runtime (libcudart)

EXPORT const char* cudaGetErrorName(cudaError_t e) {
  if (e == cudaErrorMemoryAllocation) return "cudaErrorMemoryAllocation";
  return e == cudaErrorNotSupported ? "cudaErrorNotSupported" : "cudaErrorFake";
}
EXPORT const char* cudaGetErrorString(cudaError_t e) {
  if (e == cudaErrorNotSupported) return "not implemented by the CPU stand-in";
  return "error from the CPU stand-in";
}
EXPORT cudaError_t cudaGetLastError() { return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* v) { return give(v, 13020); }
EXPORT cudaError_t cudaRuntimeGetVersion(int* v) { return give(v, 13020); }
EXPORT cudaError_t cudaGetDevice(int* d) { return give(d, 0); }
EXPORT cudaError_t cudaSetDevice(int d) { return d ? cudaErrorInvalidDevice : cudaSuccess; }
EXPORT cudaError_t cudaGetDeviceCount(int* n) { return give(n, 1); }
EXPORT cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return give(v, 8);
    case cudaDevAttrMultiProcessorCount: return give(v, PROCESSORS);
    case cudaDevAttrWarpSize: return give(v, WARP);
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return give(v, MAX_THREADS);
    case cudaDevAttrMaxBlockDimZ: return give(v, 64);
    case cudaDevAttrMaxGridDimX: return give(v, 2147483647);
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return give(v, 65535);
    case cudaDevAttrMaxSharedMemoryPerBlock:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return give(v, SHARED);
    default: return give(v, 0);
  }
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "CPU stand-in");
  p->totalGlobalMem = MEMORY;
  p->major = 8;
  p->warpSize = WARP;
  p->maxThreadsPerBlock = MAX_THREADS;
  p->sharedMemPerBlock = SHARED;
  p->multiProcessorCount = PROCESSORS;
  p->maxGridSize[0] = 2147483647;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() { return wait(); }

EXPORT cudaError_t cudaMalloc(void** p, size_t n) { return allocate(p, n); }
EXPORT cudaError_t cudaMallocManaged(void** p, size_t n, unsigned) { return allocate(p, n); }
EXPORT cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return allocate(p, n); }
EXPORT cudaError_t cudaFree(void* p) { return release(p); }
EXPORT cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
EXPORT cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return give(p, malloc(n)); }
EXPORT cudaError_t cudaFreeHost(void* p) { return destroy(p); }
EXPORT cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  *left = *total = MEMORY;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
  wait();
  return copy(to, from, n, kind);
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t) {
  return copy(to, from, n, kind);
}
EXPORT cudaError_t cudaMemset(void* d, int v, size_t n) {
  memset(d, v, n);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) {
  return cudaMemset(d, v, n);
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  const bool device = on_device(p);
  memset(a, 0, sizeof *a);
  a->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->device = device ? 0 : -2;
  a->devicePointer = device ? const_cast<void*>(p) : nullptr;
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* s) { return create(s); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return create(s); }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
  return create(s);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t s) { return destroy(s); }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait(); }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return give(status, cudaStreamCaptureStatusNone);
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* e) { return create(e); }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return create(e); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) { return destroy(e); }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait(); }
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  return give(ms, 0.0f);
}

// ---------------------------------------------------------------- driver (libcuda)

namespace {

// CUresult's numbers: cuda.h is not needed for four of them.
enum { OK = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };

// How an image starts that is not a cubin but the path of a shared library.
const std::string IMAGE = "FAKE:";

typedef void (*Trampoline)(void** arguments);
typedef void (*Runner)(Trampoline, const unsigned* dimensions, size_t shared, void** arguments);

struct Function {
  Trampoline trampoline;
  Runner run;
};

template <class T>
int answer(T* out, T value) {
  *out = value;
  return OK;
}

}  // namespace

EXPORT int cuGetErrorName(int, const char** s) { return answer(s, (const char*)"CUDA_ERROR_FAKE"); }
EXPORT int cuGetErrorString(int, const char** s) {
  return answer(s, (const char*)"error from the CPU stand-in");
}
EXPORT int cuCtxGetCurrent(void** c) { return answer(c, (void*)1); }
EXPORT int cuCtxSetCurrent(void*) { return OK; }
EXPORT int cuCtxGetDevice(int* d) { return answer(d, 0); }
EXPORT int cuModuleLoadData(void** module, const void* image) {
  const char* text = (const char*)image;
  if (strncmp(text, IMAGE.c_str(), IMAGE.size())) return INVALID_IMAGE;
  *module = dlopen(text + IMAGE.size(), RTLD_NOW | RTLD_LOCAL);
  if (*module) return OK;
  fprintf(stderr, "fakecuda: %s\n", dlerror());
  return INVALID_IMAGE;
}
EXPORT int cuModuleUnload(void*) { return OK; }  // functions of it may still be held
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  auto trampoline = (Trampoline)dlsym(module, (std::string("fake_call_") + name).c_str());
  if (!trampoline) return NOT_FOUND;
  return answer(function, (void*)new Function{trampoline, (Runner)dlsym(module, "fake_run")});
}
EXPORT int cuModuleGetGlobal_v2(void** p, size_t* size, void* module, const char* name) {
  if (size) *size = 0;
  *p = dlsym(module, name);
  return *p ? OK : NOT_FOUND;
}
EXPORT int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared, void*, void** arguments,
                          void**) {
  if (bx * by * bz > (unsigned)MAX_THREADS) return INVALID_VALUE;
  const unsigned dimensions[6] = {gx, gy, gz, bx, by, bz};
  Guard guard(door);  // a kernel's built-in variables are static
  stats.launch++;
  auto f = (Function*)function;
  f->run(f->trampoline, dimensions, shared, arguments);
  return OK;
}
EXPORT int cuFuncGetAttribute(int* v, int attribute, void*) {
  return answer(v, attribute == 0 ? MAX_THREADS : 0);
}
EXPORT int cuFuncSetAttribute(void*, int, int) { return OK; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int, size_t) {
  return answer(n, 2);
}
EXPORT int cuOccupancyMaxPotentialBlockSize(int* grid, int* block, void*, void*, size_t, int) {
  return answer(grid, 2 * PROCESSORS) | answer(block, 128);
}

// ---------------------------------------------------------------- NVRTC

namespace {

enum { COMPILATION_FAILED = 6, NO_SUCH_NAME = 9 };  // nvrtcResult

struct Program {
  std::string source, image, log;
  std::vector<std::string> expressions, lowered;
};

void write(const std::string& path, const std::string& text) {
  FILE* file = fopen(path.c_str(), "w");
  if (!file) return;  // the compiler will say what it cannot read
  fwrite(text.data(), 1, text.size(), file);
  fclose(file);
}

std::string read(const std::string& path) {
  std::string text;
  if (FILE* file = fopen(path.c_str(), "r")) {
    char buffer[4096];
    while (size_t n = fread(buffer, 1, sizeof buffer, file)) text.append(buffer, n);
    fclose(file);
  }
  return text;
}

// Compile into `library`; several processes may do so at once, so each works under a name of its
// own and the finished file takes its place in one step.
bool compile(Program* program, const std::string& library, const std::string& options) {
  const std::string own = library + "." + std::to_string(getpid());
  write(own + ".cu", program->source);
  std::string names;
  for (auto& expression : program->expressions) names += expression + "\n";
  write(own + ".names", names);
  const std::string command = std::string(getenv("FAKECUDA_CC")) + " '" + own + "'" + options;
  const bool good = !system((command + " >'" + own + ".log' 2>&1").c_str()) &&
                    !rename((own + ".so").c_str(), library.c_str());
  program->log = read(own + ".log");
  for (const char* end : {".cu", ".names", ".log", ".cpp"}) unlink((own + end).c_str());
  return good;
}

}  // namespace

EXPORT const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR_COMPILATION (g++)"; }
EXPORT int nvrtcVersion(int* major, int* minor) { return answer(major, 13) | answer(minor, 2); }
EXPORT int nvrtcCreateProgram(void** program, const char* source, const char*, int, const char**,
                              const char**) {
  return answer(program, (void*)new Program{source, "", "", {}, {}});
}
EXPORT int nvrtcDestroyProgram(void** program) {
  delete (Program*)*program;
  return OK;
}
EXPORT int nvrtcAddNameExpression(void* program, const char* expression) {
  ((Program*)program)->expressions.push_back(expression);
  return OK;
}
EXPORT int nvrtcCompileProgram(void* handle, int count, const char** options) {
  auto program = (Program*)handle;
  if (program->source.find("__global__") == std::string::npos) {
    program->image = "// CuPy asks what the preprocessor makes of its headers: always this";
    return OK;
  }
  std::string key = program->source, passed;
  for (int i = 0; i < count; i++) {
    key += std::string("\n//") + options[i];
    if (!strncmp(options[i], "-I", 2) || !strncmp(options[i], "-D", 2))
      passed += std::string(" '") + options[i] + "'";
  }
  for (auto& expression : program->expressions) key += "\n//name " + expression;
  const std::string folder = getenv("FAKECUDA_CACHE");
  mkdir(folder.c_str(), 0755);
  char name[48];
  snprintf(name, sizeof name, "/%016zx%08zx.so", std::hash<std::string>()(key), key.size());
  const std::string library = folder + name;
  if (access(library.c_str(), R_OK) && !compile(program, library, passed))
    return COMPILATION_FAILED;
  program->image = IMAGE + library;
  return OK;
}
EXPORT int nvrtcGetCUBINSize(void* program, size_t* n) {
  return answer(n, ((Program*)program)->image.size() + 1);
}
EXPORT int nvrtcGetCUBIN(void* program, char* out) {
  strcpy(out, ((Program*)program)->image.c_str());
  return OK;
}
EXPORT int nvrtcGetPTXSize(void* program, size_t* n) { return nvrtcGetCUBINSize(program, n); }
EXPORT int nvrtcGetPTX(void* program, char* out) { return nvrtcGetCUBIN(program, out); }
EXPORT int nvrtcGetProgramLogSize(void* program, size_t* n) {
  return answer(n, ((Program*)program)->log.size() + 1);
}
EXPORT int nvrtcGetProgramLog(void* program, char* out) {
  strcpy(out, ((Program*)program)->log.c_str());
  return OK;
}
EXPORT int nvrtcGetLoweredName(void* handle, const char* expression, const char** name) {
  auto program = (Program*)handle;
  auto& known = program->expressions;
  program->lowered.resize(known.size());
  for (size_t i = 0; i < known.size(); i++) {
    if (known[i] != expression) continue;
    program->lowered[i] = "name" + std::to_string(i);
    return answer(name, program->lowered[i].c_str());
  }
  return NO_SUCH_NAME;
}
