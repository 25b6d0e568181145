/* The GPUs to choose from, with the figures of NVIDIA's data sheets that PyTorch and Triton ask for. */
#include "device.h"

#include <stdlib.h>
#include <string.h>

#define GB ((size_t)1 << 30)
#define KB 1024

static const struct device devices[] = {
    {9, 0, "NVIDIA H100 80GB HBM3", 132, 227 * KB, 2048, 80 * GB},
    {7, 5, "Tesla T4", 40, 64 * KB, 1024, 16 * GB},
    {8, 0, "NVIDIA A100-SXM4-80GB", 108, 163 * KB, 2048, 80 * GB},
    {8, 6, "NVIDIA GeForce RTX 3090", 82, 99 * KB, 1536, 24 * GB},
    {10, 0, "NVIDIA B200", 148, 227 * KB, 2048, 180 * GB},
};

const struct device *null_gpu_device(void) {
    const char *wanted = getenv("NULL_GPU_CAPABILITY");
    if (!wanted)
        return &devices[0];
    const char *dot = strchr(wanted, '.');
    int major = atoi(wanted);
    int minor = dot ? atoi(dot + 1) : 0;
    for (unsigned i = 0; i < sizeof devices / sizeof *devices; i++) {
        if (devices[i].major == major && devices[i].minor == minor)
            return &devices[i];
    }
    abort(); /* build.py offers only these */
}

int null_gpu_attribute(int attribute) {
    const struct device *device = null_gpu_device();
    switch (attribute) {
    case 1: /* threads per block */
    case 2: /* block size in x */
    case 3: /* block size in y */
        return 1024;
    case 4: /* block size in z */
        return 64;
    case 5: /* grid size in x */
        return 2147483647;
    case 6: /* grid size in y */
    case 7: /* grid size in z */
        return 65535;
    case 8: /* shared memory per block without asking for more */
        return 48 * KB;
    case 10: /* threads per warp */
        return 32;
    case 12: /* registers per block */
    case 82: /* registers per multiprocessor */
        return 65536;
    case 13: /* clock in kHz */
        return 1980000;
    case 16:
        return device->multiprocessors;
    case 36: /* memory clock in kHz */
        return 2619000;
    case 37: /* memory bus width in bits */
        return 5120;
    case 38: /* L2 cache */
        return 50 * KB * KB;
    case 39:
        return device->threads;
    case 75:
        return device->major;
    case 76:
        return device->minor;
    case 81: /* shared memory per multiprocessor: a block's and 1 KB for the system */
        return device->shared_memory + KB;
    case 97: /* shared memory per block for those who ask */
        return device->shared_memory;
    case 106: /* blocks per multiprocessor */
        return 32;
    default: /* a property that the device has */
        return 1;
    }
}
