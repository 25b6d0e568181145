/* libcuda.so.1: the functions of the CUDA driver that PyTorch, its compiler and Triton call. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"
#include "device.h"

int null_gpu_success(void) {
    return 0;
}

#define NOTHING(name) \
    int name(void) { \
        return 0; \
    }

NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuModuleUnload)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuTensorMapEncodeTiled)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuLinkAddData_v2)
NOTHING(cuLinkComplete)
NOTHING(cuLinkCreate_v2)
NOTHING(cuStreamSynchronize)
NOTHING(cuStreamGetCtx)
NOTHING(cuMemcpyHtoDAsync_v2)
NOTHING(cuMemFree_v2)
NOTHING(cuProfilerStart)
NOTHING(cuProfilerStop)

/* ------------------------------------------------------------------------------------------- device and context */

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = 1;
    return 0;
}

int cuDeviceGet(int *device, int index) {
    *device = index;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = null_gpu_attribute(attribute);
    return 0;
}

int cuCtxGetDevice(int *device) {
    *device = 0;
    return 0;
}

int cuCtxGetCurrent(void **context) {
    *context = (void *)0x10;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    return cuCtxGetCurrent(context);
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    if (flags)
        *flags = 0;
    *is_active = 1;
    return 0;
}

int cuCtxGetLimit(uint64_t *value, int limit) {
    *value = 0;
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = "an error of the null GPU";
    return 0;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, void *status) {
    *function = NULL;
    return 0;
}

int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
    const int device_pointer = 3;
    const int on_device = 2;
    if (attribute == device_pointer)
        *(uint64_t *)value = pointer;
    else
        *(int *)value = on_device;
    return 0;
}

int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
    *pointer = (uint64_t)(uintptr_t)malloc(size);
    return 0;
}

int cuStreamIsCapturing(void *stream, int *status) {
    *status = null_gpu_is_capturing();
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ kernels */

int cuModuleLoadData(void **module, const void *image) {
    *module = malloc(1);
    return 0;
}

int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void **values) {
    return cuModuleLoadData(module, image);
}

int cuModuleLoad(void **module, const char *file) {
    return cuModuleLoadData(module, NULL);
}

/* A function of the driver is its own name. */
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = strdup(name);
    return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    switch (attribute) {
    case 0: /* threads per block */
        *value = 1024;
        break;
    case 4: /* registers */
        *value = 32;
        break;
    default: /* no static shared or spilled memory */
        *value = 0;
    }
    return 0;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
    *blocks = 2;
    return 0;
}

int cuOccupancyMaxActiveClusters(int *clusters) {
    *clusters = 132;
    return 0;
}

int cuLaunchKernel(void *function) {
    null_gpu_count_launch(function, function);
    return 0;
}

int cuLaunchCooperativeKernel(void *function) {
    null_gpu_count_launch(function, function);
    return 0;
}

int cuLaunchKernelEx(const void *config, void *function) {
    null_gpu_count_launch(function, function);
    return 0;
}
