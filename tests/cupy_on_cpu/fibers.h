// The threads of a block for kernels that synchronise them: one fiber each, which runs until it has
// to wait.  x86-64 only (System V): `fake_switch` saves the registers that a call must preserve.
asm(R"(
.text
.local fake_switch
.type fake_switch,@function
fake_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void fake_switch(void** save, void* to);

namespace fake {

const int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32;
// Not a power of two, lest the tops of all stacks share a few lines of the processor's cache.
const size_t STACK = 65536 + 13 * 64;

struct Fiber {
  void* stack;
  bool done;
  uint3 index;
};

// Where threads wait for one another: open when as many have arrived as are alive.
struct Barrier {
  int arrived, alive;
  unsigned generation;

  void open_if_full() {
    if (alive && arrived < alive) return;
    arrived = 0;
    generation++;
  }
  void wait();
  void leave() {
    alive--;
    if (alive && arrived >= alive) open_if_full();
  }
};

static Fiber fibers[MAX_THREADS];
static int count, current;
static void* main_stack;
static char* stacks;
static void (*kernel)(void**);
static void** arguments;
static Barrier all, warps[MAX_WARPS];
static char exchanged[MAX_THREADS][16];

static int after(int i) { return i + 1 == count ? 0 : i + 1; }

static void resume(void** save, int fiber) {
  current = fiber;
  threadIdx = fibers[fiber].index;
  fake_switch(save, fibers[fiber].stack);
}

static void yield() {
  const int me = current;
  int next = after(me);
  while (fibers[next].done && next != me) next = after(next);
  if (next != me) resume(&fibers[me].stack, next);
}

inline void Barrier::wait() {
  const unsigned now = generation;
  arrived++;
  open_if_full();
  while (generation == now) yield();
}

static void entry() {
  kernel(arguments);
  fibers[current].done = true;
  all.leave();
  warps[current / 32].leave();
  void* unused;
  if (all.alive == 0) fake_switch(&unused, main_stack);
  int next = after(current);
  while (fibers[next].done) next = after(next);
  resume(&unused, next);
}

// What a thread of the warp holds; its own value where `valid` is false.
template <class T>
static T shuffle(T value, int source, bool valid = true) {
  const int me = current, warp = me / 32;
  T result;
  memcpy(exchanged[me], &value, sizeof value);
  warps[warp].wait();
  memcpy(&result, exchanged[valid ? warp * 32 + source : me], sizeof result);
  warps[warp].wait();
  return result;
}

static int lane() { return current % 32; }

}  // namespace fake

static void fake_block(void (*kernel)(void**), void** arguments) {
  using namespace fake;
  if (!stacks) stacks = (char*)malloc(STACK * MAX_THREADS);
  fake::kernel = kernel;
  fake::arguments = arguments;
  count = blockDim.x * blockDim.y * blockDim.z;
  all = {0, count, 0};
  for (int w = 0; w < MAX_WARPS; w++) warps[w] = {0, std::max(0, std::min(32, count - w * 32)), 0};
  for (int t = 0; t < count; t++) {
    auto top = (void**)((uintptr_t)(stacks + STACK * (t + 1) - 64) & ~(uintptr_t)15);
    *--top = nullptr;  // aligns the stack as if `entry` had been called
    *--top = (void*)entry;
    for (int r = 0; r < 6; r++) *--top = nullptr;  // the registers that fake_switch restores
    fibers[t].stack = top;
    fibers[t].done = false;
    fibers[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
  }
  resume(&main_stack, 0);
}

static inline void __syncthreads() { fake::all.wait(); }
static inline void __syncwarp(unsigned = 0xffffffff) { fake::warps[fake::current / 32].wait(); }
template <class T>
static T __shfl_sync(unsigned, T value, int source, int width = 32) {
  return fake::shuffle(value, fake::lane() / width * width + source % width);
}
template <class T>
static T __shfl_up_sync(unsigned, T value, unsigned by, int width = 32) {
  return fake::shuffle(value, fake::lane() - (int)by, fake::lane() % width >= (int)by);
}
template <class T>
static T __shfl_down_sync(unsigned, T value, unsigned by, int width = 32) {
  return fake::shuffle(value, fake::lane() + (int)by, fake::lane() % width + (int)by < width);
}
template <class T>
static T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return fake::shuffle(value, fake::lane() ^ mask);
}
