/* Memory of the null GPU, the part of the CUDA runtime that allocates and copies.
 *
 * Device memory is reserved address space: it costs no RAM until the host copies into it, and holds zeros before.
 * Copies between host and device, and small ones on the device, move bytes.
 */
#define _GNU_SOURCE
#include <driver_types.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "counters.h"
#include "device.h"

/* The pieces of memory that CUDA knows of: on the device, or pinned on the host. */
#define PIECES 65536

static struct piece {
    char *start;
    size_t size;
    enum cudaMemoryType type;
} pieces[PIECES];

static int used_pieces; /* those behind it have never been used */
static size_t device_bytes;
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;

/* The piece that an address lies in, or NULL. The caller holds the lock. */
static struct piece *find_piece(const void *address) {
    const char *wanted = address;
    for (int i = 0; i < used_pieces; i++) {
        if (pieces[i].start && pieces[i].start <= wanted && wanted < pieces[i].start + pieces[i].size)
            return &pieces[i];
    }
    return NULL;
}

/* Reserve a piece. Returns NULL if there is no more. */
static void *make_piece(size_t size, enum cudaMemoryType type) {
    if (size == 0)
        size = 1;
    pthread_mutex_lock(&memory_lock);
    int free = 0;
    while (free < used_pieces && pieces[free].start)
        free++;
    int is_on_device = type == cudaMemoryTypeDevice;
    int is_full = free == PIECES || (is_on_device && device_bytes + size > null_gpu_device()->memory);
    void *start = MAP_FAILED;
    if (!is_full)
        start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
        pieces[free].start = start;
        pieces[free].size = size;
        pieces[free].type = type;
        if (free == used_pieces)
            used_pieces++;
        if (is_on_device)
            device_bytes += size;
    }
    pthread_mutex_unlock(&memory_lock);
    return start == MAP_FAILED ? NULL : start;
}

static void free_piece(void *address) {
    pthread_mutex_lock(&memory_lock);
    struct piece *piece = address ? find_piece(address) : NULL;
    if (piece) {
        if (piece->type == cudaMemoryTypeDevice)
            device_bytes -= piece->size;
        munmap(piece->start, piece->size);
        piece->start = NULL;
    }
    pthread_mutex_unlock(&memory_lock);
}

static enum cudaMemoryType type_of(const void *address) {
    pthread_mutex_lock(&memory_lock);
    struct piece *piece = find_piece(address);
    enum cudaMemoryType type = piece ? piece->type : cudaMemoryTypeUnregistered;
    pthread_mutex_unlock(&memory_lock);
    return type;
}

cudaError_t cudaMalloc(void **address, size_t size) {
    cudaError_t refused = null_gpu_refuse_while_capturing();
    if (refused)
        return refused;
    null_gpu_count(ALLOCATIONS);
    *address = make_piece(size, cudaMemoryTypeDevice);
    return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *address) {
    cudaError_t refused = null_gpu_refuse_while_capturing();
    if (!refused)
        free_piece(address);
    return refused;
}

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    *address = make_piece(size, cudaMemoryTypeHost);
    return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *address) {
    free_piece(address);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = null_gpu_device()->memory;
    *free = *total - device_bytes;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = type_of(address);
    attributes->devicePointer = (void *)address;
    attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

/* Larger copies within the device move nothing: they would turn reserved memory into RAM. */
#define SMALL (1 << 16)

static void copy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDefault) {
        int from_device = type_of(source) == cudaMemoryTypeDevice;
        int to_device = type_of(target) == cudaMemoryTypeDevice;
        if (from_device)
            kind = to_device ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost;
        else
            kind = to_device ? cudaMemcpyHostToDevice : cudaMemcpyHostToHost;
    }
    if (kind == cudaMemcpyDeviceToHost)
        null_gpu_count(TO_HOST);
    if (kind == cudaMemcpyHostToDevice)
        null_gpu_count(TO_DEVICE);
    if (kind == cudaMemcpyDeviceToDevice)
        null_gpu_count(ON_DEVICE);
    if (kind != cudaMemcpyDeviceToDevice || size < SMALL)
        memmove(target, source, size);
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    cudaError_t refused = null_gpu_refuse_while_capturing();
    if (refused)
        return refused;
    null_gpu_count(WAITS);
    copy(target, source, size, kind);
    return cudaSuccess;
}

/* CUDA can capture a copy between host and device, but replays would read and write the same host memory again. */
cudaError_t cudaMemcpyAsync(
    void *target, const void *source, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream
) {
    if (kind != cudaMemcpyDeviceToDevice) {
        cudaError_t refused = null_gpu_refuse_while_capturing();
        if (refused)
            return refused;
    }
    copy(target, source, size, kind);
    return cudaSuccess;
}

/* Fills are made where that costs nothing: memory that nobody has written to holds zeros. */
static void fill(void *target, int value, size_t size) {
    null_gpu_count(FILLS);
    if (size < SMALL)
        memset(target, value, size);
}

cudaError_t cudaMemset(void *target, int value, size_t size) {
    fill(target, value, size);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream) {
    fill(target, value, size);
    return cudaSuccess;
}
