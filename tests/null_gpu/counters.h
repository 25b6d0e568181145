/* What the null GPU counts. counts.py reads the same list in the same order. */
#ifndef COUNTERS_H
#define COUNTERS_H

enum counter {
    LAUNCHES,       /* kernels, products and convolutions that the host launches one by one */
    PRODUCTS,       /* those among them that are matrix products of cuBLAS */
    CONVOLUTIONS,   /* those among them that are convolutions of cuDNN */
    TO_HOST,        /* copies from the device to the host */
    TO_DEVICE,      /* copies from the host to the device */
    ON_DEVICE,      /* copies within the device */
    FILLS,          /* memsets */
    WAITS,          /* times that the host waits for a stream or for the device */
    EVENT_WAITS,    /* times that the host waits for an event */
    ALLOCATIONS,    /* cudaMalloc: what the caching allocator could not serve */
    CAPTURED,       /* launches recorded into a graph instead of made */
    GRAPH_LAUNCHES, /* launches of whole graphs */
    UNSAFE,         /* calls that a capture forbids */
    COUNTERS,
};

void null_gpu_count(enum counter counter);

/* Count one launch of a kernel, which `key` identifies: made at once, or recorded into the graph being captured. */
void null_gpu_count_launch(const void *key, const char *name);

/* Give the name of a kernel before its first launch. */
void null_gpu_name_kernel(const void *key, const char *name);

/* Whether launches are being recorded into a graph. */
int null_gpu_is_capturing(void);

/* Count a call that a capture forbids. Returns the error that it gets, or 0 if there is no capture. */
int null_gpu_refuse_while_capturing(void);

#endif
