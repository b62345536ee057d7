// A CUDA driver of the few entry points that mass-cuda calls, whose device is this CPU. Built as libcuda.so from the
// same kernels by `cargo xtask cuda-emu`. What it checks, and how a test steers it, is told in README.md.
#include "table.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <fcntl.h>
#include <link.h>
#include <map>
#include <mutex>
#include <random>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace emu {

static void say(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fprintf(stderr, "emulated GPU: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
}

// What tests read and write through a file, word by word.
enum Word {
    LAUNCHES,
    ALLOCATIONS,
    FREED,
    LIVE_BYTES,
    PEAK_BYTES,
    UP_COUNT,
    UP_BYTES,
    UP_LARGEST,
    DOWN_COUNT,
    DOWN_BYTES,
    DOWN_LARGEST,
    DEVICE_BYTES,
    FAULTS,
    FAIL_ALLOCATION = 16,
    FAIL_LAUNCH,
    SCHEDULE,
    MEMORY, // 1: the next one fails, 2: the one after it; which schedule; bytes there are
    WORDS = 32
};
static uint64_t own_words[WORDS];
static uint64_t *words = own_words;

static void map_words() {
    const char *path = getenv("EMU_CONTROL");
    if (!path) return;
    int file = open(path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof own_words) != 0) {
        say("cannot use %s", path);
        return;
    }
    void *at = mmap(nullptr, sizeof own_words, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at != MAP_FAILED) words = (uint64_t *)at;
}

// 0, 1, or any other number, of which as many bits as a shuffle has are used.
static int schedule() {
    const char *from_outside = getenv("EMU_SCHEDULE");
    const uint64_t number = from_outside ? (uint64_t)strtoll(from_outside, nullptr, 10) : words[SCHEDULE];
    return number < 2 ? (int)number : (int)(2 + number % 0x7ffffff0u);
}

static bool due(Word word) { return words[word] > 0 && --words[word] == 0; }

// Errors of a kernel stick, as on a GPU, and show at the next call.
static std::atomic<int> sticky{0};

// ---- Fibers ----

enum { READY, BLOCK_WAIT, WARP_WAIT, DONE };
static const size_t STACK = 64 << 10;
static const unsigned MOST_THREADS = 1024;

struct Inside {
    void *scheduler_sp = nullptr;
    Kernel *kernel = nullptr;
    void **params = nullptr;
    std::vector<Fiber> fibers;
    std::vector<unsigned> turn;
    std::vector<uint64_t> slots;
    char *stacks = nullptr;
    sigjmp_buf out;
    volatile bool running = false;
    bool used_barrier = false;
    // Of each word of shared memory, who touched it since which barrier: see `touch`.
    struct Touched {
        uint32_t write_epoch, read_epoch;
        uint16_t writer, reader;
    };
    std::vector<Touched> touched;
    uint32_t epoch = 1;
    bool raced = false;
    void *tls = nullptr;
    size_t tls_size = 0;
    struct Shared {
        size_t first = 0, end = 0, blocks = 0;
        bool look = false;
    };
    std::map<Kernel *, Shared> shared;
    Inside() : slots(MOST_THREADS) {
        stacks = (char *)mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
};

thread_local Runner runner;

extern "C" __attribute__((visibility("hidden"))) void emu_switch(void **save, void *to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// Two threads that touch a word of shared memory between the same two barriers, one of them writing, race: whatever the
// schedule made of it. A shuffle orders no memory. Called for every access of a driver that is built to look for races.
static const uint16_t SEVERAL = 0xffff;
extern "C" __attribute__((visibility("hidden"))) void emu_touch(void *at, size_t size, bool write) {
    Inside *in = runner.inside;
    if (!in || !in->running || !runner.now) return;
    size_t offset = (char *)at - (char *)in->tls;
    if (offset >= in->tls_size || ((char *)at >= (char *)&runner && (char *)at < (char *)(&runner + 1))) return;
    if (in->touched.empty()) in->touched.resize(in->tls_size / 4 + 1);
    const uint16_t own = (uint16_t)runner.now->index;
    for (size_t word = offset / 4; word <= (offset + size - 1) / 4; word++) {
        auto &t = in->touched[word];
        bool race = t.write_epoch == in->epoch && t.writer != own;
        if (write) race |= t.read_epoch == in->epoch && t.reader != own;
        if (race && !in->raced) {
            in->raced = true;
            say("kernel %s, block (%u, %u, %u): threads %u and %u race for shared memory", in->kernel->name,
                runner.block.x, runner.block.y, runner.block.z,
                t.write_epoch == in->epoch && t.writer != own ? t.writer : t.reader, own);
        }
        if (write) {
            t.write_epoch = in->epoch;
            t.writer = own;
        } else {
            t.reader = t.read_epoch == in->epoch && t.reader != own ? SEVERAL : own;
            t.read_epoch = in->epoch;
        }
    }
}

static void yield(int state, int site) {
    Fiber *own = runner.now;
    own->state = state;
    own->site = site;
    emu_switch(&own->sp, runner.inside->scheduler_sp);
}
__attribute__((noinline)) void block_barrier(int site) {
    runner.inside->used_barrier = true;
    yield(BLOCK_WAIT, site);
}
__attribute__((noinline)) void warp_barrier(int site) { yield(WARP_WAIT, site); }
static void entry() {
    runner.inside->kernel->run(runner.inside->params);
    yield(DONE, 0);
    abort();
}

static void fault(const Inside &in, const char *what) {
    dim3 b = runner.block;
    say("kernel %s, block (%u, %u, %u): %s", in.kernel->name, b.x, b.y, b.z, what);
}

static bool run_block(Inside &in, int order, unsigned seed) {
    auto &fibers = in.fibers;
    auto &turn = in.turn;
    // The order of the threads within each warp.
    for (unsigned i = 0; i < turn.size(); i++) turn[i] = i;
    std::minstd_rand random(seed);
    for (size_t w = 0; w < turn.size(); w += 32) {
        auto first = turn.begin() + w, end = turn.begin() + std::min(w + 32, turn.size());
        if (order == 1) std::reverse(first, end);
        if (order > 1) std::shuffle(first, end, random);
    }
    for (size_t i = 0; i < fibers.size(); i++) {
        Fiber &f = fibers[i];
        f.state = READY;
        void **top = (void **)(in.stacks + STACK * (i + 1) - 64);
        *--top = nullptr; // alignment of the stack at entry
        *--top = (void *)entry;
        top -= 6;
        memset(top, 0, 48);
        f.sp = top;
    }
    const size_t warps = (fibers.size() + 31) / 32;
    // Runs the ready threads of a warp in turn; whether any was.
    auto run_warp = [&](size_t w) {
        bool ran = false;
        for (size_t k = 32 * w; k < std::min(32 * w + 32, fibers.size()); k++) {
            Fiber &f = fibers[turn[k]];
            if (f.state != READY) continue;
            ran = true;
            runner.now = &f;
            emu_switch(&in.scheduler_sp, f.sp);
        }
        return ran;
    };
    // A warp goes on when all its threads wait at one place. 1: it does, 0: it does not wait, -1: it never will.
    auto release_warp = [&](size_t w) {
        size_t end = std::min(32 * w + 32, fibers.size()), waiting = 0;
        bool same = true;
        for (size_t i = 32 * w; i < end; i++) {
            waiting += fibers[i].state == WARP_WAIT;
            same &= fibers[i].state == WARP_WAIT && fibers[i].site == fibers[32 * w].site;
        }
        if (waiting == 0) return 0;
        if (waiting < 32 || !same) return -1;
        for (size_t i = 32 * w; i < end; i++) fibers[i].state = READY;
        return 1;
    };
    for (;;) {
        // A warp runs as far as it can before the next begins (in the first schedule, warps go on from shuffle to
        // shuffle side by side): what one warp leaves for another is then there too early or too late, unless they wait
        // for each other.
        bool going = true;
        while (going) {
            going = false;
            for (size_t k = 0; k < warps; k++) {
                const size_t w = order == 0 ? k : order == 1 ? warps - 1 - k : (k + seed) % warps;
                int released;
                do {
                    going |= run_warp(w);
                    released = release_warp(w);
                    if (released < 0) {
                        fault(in, "a shuffle is not reached by all threads of the warp");
                        return false;
                    }
                    going |= released > 0;
                } while (released > 0 && order != 0);
            }
        }
        size_t done = 0, waiting = 0;
        bool same = true;
        for (auto &f : fibers) {
            done += f.state == DONE;
            waiting += f.state == BLOCK_WAIT;
            same &= f.site == fibers[0].site;
        }
        if (done == fibers.size()) return true;
        if (waiting < fibers.size() || !same) {
            fault(in, "a barrier is not reached by all threads of the block");
            return false;
        }
        for (auto &f : fibers) f.state = READY;
        in.epoch++;
    }
}

// The memory of this library's thread-local variables: shared memory, and `runner`.
static int find_tls(struct dl_phdr_info *info, size_t, void *data) {
    Inside *in = (Inside *)data;
    char *probe = (char *)&runner;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto &part = info->dlpi_phdr[i];
        char *at = (char *)info->dlpi_tls_data;
        if (part.p_type != PT_TLS || !at || probe < at || probe >= at + part.p_memsz) continue;
        in->tls = at;
        in->tls_size = part.p_memsz;
        return 1;
    }
    return 0;
}

// Nobody may rely on what another block left in shared memory. Of each kernel it is remembered where it lies: all that
// any block has written, looked up anew now and then.
static void poison_shared(Inside &in, Kernel *kernel) {
    Runner keep = runner;
    auto &known = in.shared[kernel];
    char *all = (char *)in.tls;
    if (known.blocks++ % 16 == 0) {
        memset(all, 0xff, in.tls_size);
        known.look = true;
    } else {
        memset(all + known.first, 0xff, known.end - known.first);
    }
    runner = keep;
}
static void look_at_shared(Inside &in, Kernel *kernel) {
    auto &known = in.shared[kernel];
    if (!known.look) return;
    known.look = false;
    const char *all = (const char *)in.tls;
    const size_t own = (const char *)&runner - all;
    static const size_t STEP = 64;
    static const auto poison = [] {
        std::array<char, STEP> p;
        p.fill((char)0xff);
        return p;
    }();
    for (size_t at = 0; at < in.tls_size; at += STEP) {
        const size_t n = std::min(STEP, in.tls_size - at);
        if ((at + n > own && at < own + sizeof runner) || memcmp(all + at, poison.data(), n) == 0) continue;
        if (known.end == 0) known.first = at;
        known.first = std::min(known.first, at);
        known.end = std::max(known.end, at + n);
    }
}

struct Launch {
    Kernel *kernel;
    dim3 grid, block;
    void **params;
    int order;
};

static void run_blocks(const Launch &launch, uint64_t first, uint64_t end) {
    Inside *in = runner.inside;
    if (!in) {
        runner = Runner();
        in = runner.inside = new Inside();
        dl_iterate_phdr(find_tls, in);
    }
    runner.slots = in->slots.data();
    unsigned n = launch.block.x * launch.block.y * launch.block.z;
    if (in->fibers.size() != n) {
        in->fibers.resize(n);
        in->turn.resize(n);
    }
    for (unsigned i = 0; i < n; i++) {
        in->fibers[i].index = i;
        in->fibers[i].tid = {i % launch.block.x, i / launch.block.x % launch.block.y,
                             i / launch.block.x / launch.block.y};
    }
    in->kernel = launch.kernel;
    in->params = launch.params;
    runner.grid = launch.grid;
    runner.block_dim = launch.block;
    in->used_barrier = true;
    uint64_t blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
    volatile bool good = true;
    if (sigsetjmp(in->out, 1) == 0) {
        in->running = true;
        for (uint64_t i = first; i < end && !sticky.load(); i++) {
            // Shuffled: by steps of a prime that does not divide their number.
            const uint64_t step = blocks % 7919 != 0 ? 7919 : 7907;
            uint64_t j = launch.order == 0   ? i
                         : launch.order == 1 ? blocks - 1 - i
                                             : (i * step + (uint64_t)launch.order) % blocks;
            runner.block = {(unsigned)(j % launch.grid.x), (unsigned)(j / launch.grid.x % launch.grid.y),
                            (unsigned)(j / launch.grid.x / launch.grid.y)};
            // A kernel without barriers has no use for shared memory; the first block is poisoned in any case.
            const bool poisoned = in->used_barrier;
            if (poisoned) poison_shared(*in, launch.kernel);
            in->used_barrier = false;
            in->epoch++;
            if (!run_block(*in, launch.order, (unsigned)j + 7 * (unsigned)launch.order)) {
                good = false;
                break;
            }
            if (poisoned) look_at_shared(*in, launch.kernel);
        }
    } else {
        sticky = 700; // CUDA_ERROR_ILLEGAL_ADDRESS
    }
    in->running = false;
    if (in->raced) {
        words[FAULTS]++;
        good = false;
        in->raced = false;
    }
    if (!good) sticky = 719; // CUDA_ERROR_LAUNCH_FAILED
}

// CPU threads that share the blocks of a launch. Never ended: the process's end ends them.
struct Pool {
    std::mutex mutex;
    std::condition_variable work, idle;
    std::vector<std::thread> threads;
    const Launch *launch = nullptr;
    uint64_t next = 0, piece = 1, blocks = 0;
    unsigned busy = 0, generation = 0;

    unsigned size() {
        static unsigned n = [] {
            const char *wanted = getenv("EMU_THREADS");
            unsigned all = wanted ? (unsigned)atoi(wanted) : std::thread::hardware_concurrency();
            return std::max(1u, std::min(all, 16u));
        }();
        return n;
    }
    void take_part() {
        for (;;) {
            uint64_t first, end;
            const Launch *own;
            {
                std::unique_lock<std::mutex> lock(mutex);
                if (!launch || next >= blocks) return;
                own = launch;
                first = next;
                end = next = std::min(blocks, next + piece);
            }
            run_blocks(*own, first, end);
        }
    }
    void helper() {
        unsigned seen = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex);
                work.wait(lock, [&] { return generation != seen; });
                seen = generation;
            }
            take_part();
            std::unique_lock<std::mutex> lock(mutex);
            if (--busy == 0) idle.notify_all();
        }
    }
    void run(const Launch &wanted) {
        uint64_t all = (uint64_t)wanted.grid.x * wanted.grid.y * wanted.grid.z;
        unsigned helpers = size() - 1;
        if (helpers == 0 || all < 4) {
            run_blocks(wanted, 0, all);
            return;
        }
        {
            std::unique_lock<std::mutex> lock(mutex);
            while (threads.size() < helpers) {
                threads.emplace_back([this] { helper(); });
                threads.back().detach();
            }
            launch = &wanted;
            next = 0;
            blocks = all;
            piece = std::max<uint64_t>(1, all / (4 * size()));
            busy = helpers;
            generation++;
        }
        work.notify_all();
        take_part();
        std::unique_lock<std::mutex> lock(mutex);
        idle.wait(lock, [&] { return busy == 0; });
        launch = nullptr;
    }
};
static Pool &pool() {
    static Pool *one = new Pool();
    return *one;
}

// ---- Memory: between pages that may not be touched; contents begin as NaN ----

struct Allocation {
    char *base;
    size_t mapped, size;
};
static std::map<char *, Allocation> maps; // by address
static std::mutex memory;
static const size_t PAGE = 4096;

static char *allocate(size_t n, bool at_end) {
    size_t body = (n + PAGE - 1) / PAGE * PAGE;
    char *base = (char *)mmap(nullptr, body + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    mprotect(base, PAGE, PROT_NONE);
    mprotect(base + PAGE + body, PAGE, PROT_NONE);
    memset(base + PAGE, 0xff, body);
    // Values of a GPU's allocations are aligned for any vector.
    char *p = at_end ? base + PAGE + body - (n + 15) / 16 * 16 : base + PAGE;
    maps[p] = {base, body + 2 * PAGE, n};
    return p;
}

// Whether what lies between an allocation and its guard pages is untouched.
static bool intact(char *p, const Allocation &a) {
    for (char *c = a.base + PAGE; c < p; c++)
        if (*c != (char)0xff) return false;
    for (char *c = p + a.size; c < a.base + a.mapped - PAGE; c++)
        if (*c != (char)0xff) return false;
    return true;
}

static Allocation *owner(char *p, size_t n) {
    auto next = maps.upper_bound(p);
    if (next == maps.begin()) return nullptr;
    auto &found = *--next;
    return p + n <= found.first + found.second.size ? &found.second : nullptr;
}

static struct sigaction before[3];
static void on_fault(int signal, siginfo_t *info, void *) {
    Inside *in = runner.inside;
    if (in && in->running) {
        in->running = false;
        if (signal == SIGFPE) {
            fault(*in, "an integer is divided by zero");
            siglongjmp(in->out, 1);
        }
        char what[160];
        char *at = (char *)info->si_addr;
        snprintf(what, sizeof what, "thread %u touches address %p outside of every allocation", runner.now->index,
                 (void *)at);
        for (auto &[p, a] : maps) {
            if (at < a.base || at >= a.base + a.mapped) continue;
            long past = at - (p + a.size), ahead = p - at;
            snprintf(what, sizeof what, "thread %u touches memory %ld bytes %s an allocation of %zu", runner.now->index,
                     past >= 0 ? past : ahead, past >= 0 ? "past the end of" : "before", a.size);
        }
        words[FAULTS]++;
        fault(*in, what);
        siglongjmp(in->out, 1);
    }
    sigaction(signal,
              &before[signal == SIGBUS   ? 1
                      : signal == SIGFPE ? 2
                                         : 0],
              nullptr); // comes again, to who was there before
}

static void start() {
    static std::once_flag once;
    std::call_once(once, [] {
        map_words();
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGSEGV, &action, &before[0]);
        sigaction(SIGBUS, &action, &before[1]);
        sigaction(SIGFPE, &action, &before[2]);
    });
}

} // namespace emu

using namespace emu;
#define API extern "C" __attribute__((visibility("default"))) int
#define STUCK()                                                                                                        \
    do {                                                                                                               \
        if (int e = sticky.load()) return e;                                                                           \
    } while (0)
#define IGNORED(name, ...)                                                                                             \
    API name(__VA_ARGS__) {                                                                                            \
        STUCK();                                                                                                       \
        return 0;                                                                                                      \
    }

API cuInit(unsigned) {
    start();
    const char *e = getenv("EMU_INIT"); // a driver that refuses
    return e ? atoi(e) : 0;
}
API cuDriverGetVersion(int *v) {
    const char *e = getenv("EMU_VERSION");
    *v = e ? atoi(e) : 12020;
    return 0;
}
API cuDeviceGetCount(int *n) {
    const char *e = getenv("EMU_DEVICES");
    *n = e ? atoi(e) : 1;
    return 0;
}
API cuDeviceGet(int *d, int i) {
    *d = i;
    return i == 0 ? 0 : 101;
}
API cuDeviceGetName(char *s, int n, int) {
    snprintf(s, n, "emulated GPU");
    return 0;
}
static size_t memory_there_is() { return words[MEMORY] ? words[MEMORY] : 8ul << 30; }
API cuDeviceTotalMem_v2(size_t *n, int) {
    *n = memory_there_is();
    return 0;
}
API cuDeviceGetAttribute(int *v, int a, int) {
    const char *e = getenv("EMU_CAPABILITY"); // as 75
    int capability = e ? atoi(e) : 90;
    switch (a) {
    case 16:
        *v = 4;
        break; // multiprocessors
    case 75:
        *v = capability / 10;
        break;
    case 76:
        *v = capability % 10;
        break;
    case 115:
        *v = 1;
        break; // memory pools
    default:
        *v = 0;
    }
    return 0;
}
API cuDevicePrimaryCtxRetain(void **c, int) {
    start();
    *c = (void *)1;
    return 0;
}
API cuDevicePrimaryCtxRelease_v2(int) { return 0; }
API cuCtxGetCurrent(void **c) {
    *c = (void *)1;
    return 0;
}
IGNORED(cuCtxSetCurrent, void *)
IGNORED(cuCtxSynchronize)
API cuStreamCreate(void **s, unsigned) {
    STUCK();
    *s = (void *)2;
    return 0;
}
IGNORED(cuStreamDestroy_v2, void *)
IGNORED(cuStreamSynchronize, void *)
API cuMemGetInfo_v2(size_t *unused, size_t *all) {
    STUCK();
    *all = memory_there_is();
    *unused = *all - std::min(*all, (size_t)words[LIVE_BYTES]);
    return 0;
}
API cuMemAllocAsync(void **p, size_t n, void *) {
    STUCK();
    if (n == 0) return 1;
    std::unique_lock<std::mutex> lock(memory);
    words[ALLOCATIONS]++;
    if (due(FAIL_ALLOCATION) || words[LIVE_BYTES] + n > memory_there_is()) return 2; // CUDA_ERROR_OUT_OF_MEMORY
    *p = allocate(n, schedule() != 1);
    if (!*p) return 2;
    words[LIVE_BYTES] += n;
    words[PEAK_BYTES] = std::max(words[PEAK_BYTES], words[LIVE_BYTES]);
    return 0;
}
API cuMemFreeAsync(void *p, void *) {
    std::unique_lock<std::mutex> lock(memory);
    auto i = maps.find((char *)p);
    if (i == maps.end()) {
        say("what is freed was not allocated");
        return 1;
    }
    if (!intact(i->first, i->second)) {
        say("something was written outside of an allocation of %zu bytes", i->second.size);
        words[FAULTS]++;
        sticky = 700;
    }
    words[FREED]++;
    words[LIVE_BYTES] -= i->second.size;
    munmap(i->second.base, i->second.mapped);
    maps.erase(i);
    STUCK();
    return 0;
}
static int copy(Word count, void *to, const void *from, size_t n, void *device) {
    STUCK();
    {
        std::unique_lock<std::mutex> lock(memory);
        if (!owner((char *)device, n)) {
            say("a copy of %zu bytes leaves its allocation", n);
            return 1;
        }
    }
    memcpy(to, from, n);
    words[count]++;
    words[count + 1] += n;
    words[count + 2] = std::max<uint64_t>(words[count + 2], n);
    return 0;
}
API cuMemcpyHtoDAsync_v2(void *d, const void *s, size_t n, void *) { return copy(UP_COUNT, d, s, n, d); }
API cuMemcpyDtoHAsync_v2(void *d, void *s, size_t n, void *) { return copy(DOWN_COUNT, d, s, n, s); }
API cuMemcpyDtoDAsync_v2(void *d, void *s, size_t n, void *) {
    STUCK();
    std::unique_lock<std::mutex> lock(memory);
    if (!owner((char *)d, n) || !owner((char *)s, n)) return 1;
    memmove(d, s, n);
    words[DEVICE_BYTES] += n;
    return 0;
}
API cuMemsetD8Async(void *d, unsigned char v, size_t n, void *) {
    STUCK();
    std::unique_lock<std::mutex> lock(memory);
    if (!owner((char *)d, n)) return 1;
    memset(d, v, n);
    return 0;
}

// The bytes of each parameter of an entry of the PTX; false if there is no such entry.
static bool parameters(const std::string &ptx, size_t at, std::vector<size_t> &sizes) {
    size_t end = ptx.find(')', at);
    for (size_t i = ptx.find(".param", at); i < end; i = ptx.find(".param", i + 6)) {
        size_t stop = std::min(ptx.find(',', i), end);
        std::string one = ptx.substr(i + 6, stop - i - 6);
        size_t bracket = one.find('[');
        size_t bits = 0;
        for (const char *type :
             {".b8", ".u8", ".s8", ".b16", ".u16", ".b32", ".u32", ".s32", ".f32", ".b64", ".u64", ".s64", ".f64"})
            if (one.find(std::string(type) + " ") != std::string::npos) bits = (size_t)atoi(type + 2);
        sizes.push_back(bits / 8 * (bracket == std::string::npos ? 1 : (size_t)atol(one.c_str() + bracket + 1)));
    }
    return true;
}
// The PTX must hold the kernels of the source and no others, with parameters of the same sizes: so a stale file is
// found out.
API cuModuleLoadData(void **m, const void *image) {
    STUCK();
    std::string ptx((const char *)image);
    size_t entries = 0, listed = 0;
    for (size_t i = ptx.find(".entry "); i != std::string::npos; i = ptx.find(".entry ", i + 7)) entries++;
    for (Kernel &k : kernels()) {
        listed++;
        size_t at = ptx.find(".entry " + std::string(k.name) + "(");
        if (at == std::string::npos) {
            say("the PTX is stale: it lacks %s", k.name);
            return 218;
        } // CUDA_ERROR_INVALID_PTX
        std::vector<size_t> sizes;
        parameters(ptx, at, sizes);
        if (sizes != k.sizes) {
            say("the PTX is stale: %s has other parameters in the source", k.name);
            return 218;
        }
    }
    if (entries != listed) {
        say("the PTX is stale: it has %zu kernels, the source %zu", entries, listed);
        return 218;
    }
    *m = (void *)4;
    return 0;
}
IGNORED(cuModuleUnload, void *)
API cuModuleGetFunction(void **f, void *, const char *name) {
    STUCK();
    for (Kernel &k : kernels())
        if (!strcmp(k.name, name)) {
            *f = &k;
            return 0;
        }
    return 500; // CUDA_ERROR_NOT_FOUND
}
API cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned dynamic, void *, void **p, void **) {
    STUCK();
    words[LAUNCHES]++;
    if (due(FAIL_LAUNCH)) return 701; // CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    uint64_t threads = (uint64_t)bx * by * bz;
    if (dynamic != 0 || threads == 0 || threads > MOST_THREADS || bz > 64 || gx == 0 || gy == 0 || gz == 0 ||
        gx > 0x7fffffffu || gy > 65535 || gz > 65535)
        return 1; // CUDA_ERROR_INVALID_VALUE
    Launch launch = {(Kernel *)f, {gx, gy, gz}, {bx, by, bz}, p, schedule()};
    static std::mutex one_at_a_time;
    std::unique_lock<std::mutex> lock(one_at_a_time);
    pool().run(launch);
    return 0; // what went wrong shows at the next call
}
API cuGetErrorString(int e, const char **s) {
    static thread_local char text[64];
    switch (e) {
    case 1:
        *s = "invalid argument";
        break;
    case 2:
        *s = "out of memory";
        break;
    case 100:
        *s = "no CUDA-capable device is detected";
        break;
    case 218:
        *s = "a PTX JIT compilation failed";
        break;
    case 700:
        *s = "an illegal memory access was encountered";
        break;
    case 701:
        *s = "too many resources requested for launch";
        break;
    case 719:
        *s = "unspecified launch failure";
        break;
    default:
        snprintf(text, sizeof text, "error %d", e);
        *s = text;
    }
    return 0;
}
API cuGetErrorName(int e, const char **s) { return cuGetErrorString(e, s); }
API cuEventCreate(void **e, unsigned) {
    STUCK();
    *e = calloc(1, sizeof(struct timespec));
    return 0;
}
API cuEventRecord(void *e, void *) {
    STUCK();
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)e);
    return 0;
}
IGNORED(cuEventSynchronize, void *)
API cuEventElapsedTime(float *ms, void *a, void *b) {
    STUCK();
    auto *from = (struct timespec *)a, *to = (struct timespec *)b;
    *ms = (to->tv_sec - from->tv_sec) * 1e3f + (to->tv_nsec - from->tv_nsec) * 1e-6f;
    return 0;
}
API cuEventDestroy_v2(void *e) {
    free(e);
    return 0;
}
API cuDeviceGetDefaultMemPool(void **pool, int) {
    *pool = (void *)5;
    return 0;
}
API cuMemPoolSetAttribute(void *, int, void *) { return 0; }
