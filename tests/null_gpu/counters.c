/* The counters and the table of kernels; several threads launch at once. */
#include "counters.h"

#include <pthread.h>
#include <stdint.h>

static long counts[COUNTERS];

/* A hash table from a kernel's address to its name and launches. PyTorch registers about 60,000 kernels. */
#define KERNELS (1 << 18)

static struct kernel {
    const void *key;
    const char *name;
    long launches;
} kernels[KERNELS];

static pthread_mutex_t kernels_lock = PTHREAD_MUTEX_INITIALIZER;

void null_gpu_count(enum counter counter) {
    __atomic_fetch_add(&counts[counter], 1, __ATOMIC_RELAXED);
}

/* The kernel's place in the table: its own, or the free one where it belongs. */
static struct kernel *find_kernel(const void *key) {
    uint64_t hash = (uintptr_t)key * 0x9E3779B97F4A7C15ull;
    unsigned place = hash >> 46; /* 18 bits */
    while (kernels[place].key && kernels[place].key != key)
        place = (place + 1) % KERNELS;
    return &kernels[place];
}

void null_gpu_name_kernel(const void *key, const char *name) {
    pthread_mutex_lock(&kernels_lock);
    struct kernel *kernel = find_kernel(key);
    kernel->key = key;
    kernel->name = name;
    pthread_mutex_unlock(&kernels_lock);
}

void null_gpu_count_launch(const void *key, const char *name) {
    null_gpu_count(null_gpu_is_capturing() ? CAPTURED : LAUNCHES);
    pthread_mutex_lock(&kernels_lock);
    struct kernel *kernel = find_kernel(key);
    kernel->key = key;
    if (!kernel->name)
        kernel->name = name;
    kernel->launches++;
    pthread_mutex_unlock(&kernels_lock);
}

/* ------------------------------------------------------------------------------------------- read from Python */

void null_gpu_reset(void) {
    for (int counter = 0; counter < COUNTERS; counter++)
        counts[counter] = 0;
    for (int place = 0; place < KERNELS; place++)
        kernels[place].launches = 0;
}

void null_gpu_read(long *result) {
    for (int counter = 0; counter < COUNTERS; counter++)
        result[counter] = counts[counter];
}

/* Walk the kernels that were launched: start at place 0, then at what the last call returned, until it is 0. */
int null_gpu_next_kernel(int place, const char **name, long *launches) {
    for (; place < KERNELS; place++) {
        if (kernels[place].launches) {
            *name = kernels[place].name;
            *launches = kernels[place].launches;
            return place + 1;
        }
    }
    return 0;
}
