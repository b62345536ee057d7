// What g++ -fsanitize=thread calls for every access to memory, without its library: only shared memory is looked at.
#include <stddef.h>

extern "C" {
void emu_touch(void *at, size_t size, bool write);
#define ACCESS(n)                                                                                                      \
    void __tsan_read##n(void *p) { emu_touch(p, n, false); }                                                           \
    void __tsan_write##n(void *p) { emu_touch(p, n, true); }                                                           \
    void __tsan_unaligned_read##n(void *p) { emu_touch(p, n, false); }                                                 \
    void __tsan_unaligned_write##n(void *p) { emu_touch(p, n, true); }                                                 \
    void __tsan_volatile_read##n(void *p) { emu_touch(p, n, false); }                                                  \
    void __tsan_volatile_write##n(void *p) { emu_touch(p, n, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void *p, size_t n) { emu_touch(p, n, false); }
void __tsan_write_range(void *p, size_t n) { emu_touch(p, n, true); }
void __tsan_vptr_update(void *, void *) {}
void __tsan_vptr_read(void *) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void *) {}
void __tsan_init() {}
}
