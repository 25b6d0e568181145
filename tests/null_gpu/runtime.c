/* The CUDA runtime of a GPU that computes nothing, without its memory (memory.c).
 *
 * Kernels are counted and not run. Everything has always finished already, so waiting means counting.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"
#include "device.h"

typedef struct {
    unsigned x, y, z;
} size3;

/* A value that differs from all handles before. Nobody looks inside the handles of streams, events and graphs. */
static void *new_handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}

/* -------------------------------------------------------------------------------------------- capture of graphs */

static int is_capturing;
static cudaStream_t captured_stream;
static enum cudaStreamCaptureMode capture_mode;
static pthread_t capturing_thread;

/* A thread that has said "relaxed" knows what it does, as the allocator does around its cudaMalloc. */
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

int null_gpu_is_capturing(void) {
    return is_capturing;
}

int null_gpu_refuse_while_capturing(void) {
    if (!is_capturing || capture_mode == cudaStreamCaptureModeRelaxed)
        return cudaSuccess;
    if (thread_mode == cudaStreamCaptureModeRelaxed)
        return cudaSuccess;
    int is_other_thread = !pthread_equal(capturing_thread, pthread_self());
    if (is_other_thread && capture_mode == cudaStreamCaptureModeThreadLocal)
        return cudaSuccess;
    null_gpu_count(UNSAFE);
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode old = thread_mode;
    thread_mode = *mode;
    *mode = old;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    captured_stream = stream;
    capture_mode = mode;
    capturing_thread = pthread_self();
    is_capturing = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    is_capturing = 0;
    *graph = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    int captured = is_capturing && stream == captured_stream;
    *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream,
    enum cudaStreamCaptureStatus *status,
    unsigned long long *id,
    cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies,
    const cudaGraphEdgeData **edges,
    size_t *count
) {
    static const cudaGraphNode_t none[1];
    cudaStreamIsCapturing(stream, status);
    if (id)
        *id = 1;
    if (graph)
        *graph = (cudaGraph_t)0x1000;
    if (dependencies)
        *dependencies = none;
    if (edges)
        *edges = NULL;
    if (count)
        *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags
) {
    *executable = new_handle();
    return cudaSuccess;
}

/* PyTorch warns of a graph without nodes. */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    null_gpu_count(GRAPH_LAUNCHES);
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------------------ kernels */

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[1];
    return handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) {}

void __cudaUnregisterFatBinary(void **handle) {}

void __cudaRegisterVar(
    void **handle, char *address, char *name, const char *device, int a, size_t b, int c, int d
) {}

void __cudaRegisterFunction(
    void **handle, const char *function, char *device, const char *name,
    int a, void *b, void *c, void *d, void *e, int *f
) {
    null_gpu_name_kernel(function, name);
}

cudaError_t __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)function;
    return cudaSuccess;
}

/* While one stream is captured, its thread must launch nothing on others: no graph would hold it. */
static cudaError_t launch(const void *function, cudaStream_t stream) {
    if (is_capturing && stream != captured_stream) {
        cudaError_t refused = null_gpu_refuse_while_capturing();
        if (refused)
            return refused;
    }
    null_gpu_count_launch(function, "a kernel without a name");
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(
    const void *function, size3 grid, size3 block, void **arguments, size_t shared, cudaStream_t stream
) {
    return launch(function, stream);
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, size3 grid, size3 block, void **arguments, size_t shared, cudaStream_t stream
) {
    return launch(kernel, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launch(function, config->stream);
}

cudaError_t cudaLaunchCooperativeKernel(
    const void *function, size3 grid, size3 block, void **arguments, size_t shared, cudaStream_t stream
) {
    return launch(function, stream);
}

/* `kernel<<<grid, block, shared, stream>>>(...)` pushes the four numbers, and the kernel's own stub pops them. */
static __thread struct {
    size3 grid, block;
    size_t shared;
    void *stream;
} pushed;

unsigned __cudaPushCallConfiguration(size3 grid, size3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(size3 *grid, size3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    const struct device *device = null_gpu_device();
    memset(attributes, 0, sizeof *attributes);
    attributes->ptxVersion = 10 * device->major + device->minor;
    attributes->binaryVersion = attributes->ptxVersion;
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->maxDynamicSharedSizeBytes = device->shared_memory;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, const void *function, int size, size_t shared
) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int size, size_t shared, unsigned flags
) {
    *blocks = 2;
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------------------- device */

cudaError_t cudaGetDeviceCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = visible && !*visible ? 0 : 1;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = null_gpu_attribute(attribute);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int index) {
    const struct device *device = null_gpu_device();
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, device->name);
    properties->major = device->major;
    properties->minor = device->minor;
    properties->totalGlobalMem = device->memory;
    properties->multiProcessorCount = device->multiprocessors;
    properties->maxThreadsPerMultiProcessor = device->threads;
    properties->sharedMemPerBlockOptin = device->shared_memory;
    properties->sharedMemPerMultiprocessor = null_gpu_attribute(81);
    properties->sharedMemPerBlock = null_gpu_attribute(8);
    properties->warpSize = null_gpu_attribute(10);
    properties->regsPerBlock = null_gpu_attribute(12);
    properties->regsPerMultiprocessor = null_gpu_attribute(82);
    properties->l2CacheSize = null_gpu_attribute(38);
    properties->maxBlocksPerMultiProcessor = null_gpu_attribute(106);
    properties->maxThreadsPerBlock = null_gpu_attribute(1);
    for (int axis = 0; axis < 3; axis++) {
        properties->maxThreadsDim[axis] = null_gpu_attribute(2 + axis);
        properties->maxGridSize[axis] = null_gpu_attribute(5 + axis);
    }
    properties->concurrentKernels = 1;
    properties->unifiedAddressing = 1;
    properties->textureAlignment = 512;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) {
    return "an error of the null GPU";
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    default:
        return "an error of the null GPU";
    }
}

/* PyTorch asks here for functions of the driver, and Triton links them: both get driver.c's. */
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result
) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    *function = dlsym(driver, name);
    if (!*function)
        *function = dlsym(driver, "null_gpu_success");
    if (result)
        *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------------ streams and events */

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

static cudaError_t wait_for_device(enum counter counter) {
    cudaError_t refused = null_gpu_refuse_while_capturing();
    if (!refused)
        null_gpu_count(counter);
    return refused;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return wait_for_device(WAITS);
}

cudaError_t cudaDeviceSynchronize(void) {
    return wait_for_device(WAITS);
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return wait_for_device(EVENT_WAITS);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}
