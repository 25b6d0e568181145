/* The GPU that the null GPU claims to be: NULL_GPU_CAPABILITY=9.0 (the default) and the others of device.c. */
#ifndef DEVICE_H
#define DEVICE_H

#include <stddef.h>

struct device {
    int major;
    int minor;
    const char *name;
    int multiprocessors;
    int shared_memory; /* bytes that one block may ask for */
    int threads;       /* per multiprocessor */
    size_t memory;     /* bytes */
};

const struct device *null_gpu_device(void);

/* The value of a cudaDeviceAttr or CUdevice_attribute, which have the same numbers. */
int null_gpu_attribute(int attribute);

#endif
