/* cuBLAS, cuBLASLt and cuDNN: handles and descriptors that are good for nothing, products and plans that count. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "counters.h"

static int give_handle(void **handle) {
    *handle = malloc(1);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------- cuBLAS */

static int count_product(const char *name) {
    null_gpu_count(PRODUCTS);
    null_gpu_count_launch(name, name);
    return 0;
}

#define PRODUCT(name) \
    int name(void) { \
        static const char kernel[] = #name; \
        return count_product(kernel); \
    }

PRODUCT(cublasLtMatmul)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmBatched)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDdot_v2)

int cublasCreate_v2(void **handle) {
    return give_handle(handle);
}

int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasLtMatmulDescCreate(void **descriptor, int compute, int scale) {
    return give_handle(descriptor);
}

int cublasLtMatmulPreferenceCreate(void **preference) {
    return give_handle(preference);
}

int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    return give_handle(layout);
}

/* One algorithm, whose description is a cublasLtMatmulHeuristicResult_t of zeros: no workspace, success. */
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
    int wanted, void *results, int *found
) {
    memset(results, 0, 96);
    *found = 1;
    return 0;
}

/* -------------------------------------------------------------------------------------------------------- cuDNN */

/* Kinds of descriptors and of attributes, as cudnn_graph.h numbers them. */
enum {
    CONVOLUTION_FORWARD = 10,
    CONVOLUTION_BACKWARD_FILTER = 11,
    CONVOLUTION_BACKWARD_DATA = 12,
};

enum {
    ATTRIBUTE_INT64 = 3,
    ATTRIBUTE_DESCRIPTOR = 15,
    ATTRIBUTE_INT32 = 23,
};

/* A plan is made of a configuration of an engine for a graph of operations, and each inherits the operation's name.
 * Only convolutions have one; what has none is attention, in this repository. */
struct descriptor {
    const char *operation;
};

static const char *operation_name(int kind) {
    switch (kind) {
    case CONVOLUTION_FORWARD:
        return "cudnn_convolution_forward";
    case CONVOLUTION_BACKWARD_FILTER:
        return "cudnn_convolution_backward_filter";
    case CONVOLUTION_BACKWARD_DATA:
        return "cudnn_convolution_backward_data";
    default:
        return NULL;
    }
}

const char *cudnnGetErrorString(int error) {
    return "an error of the null GPU";
}

void cudnnGetLastErrorString(char *text, size_t size) {
    if (size)
        *text = 0;
}

int cudnnCreate(void **handle) {
    return give_handle(handle);
}

int cudnnBackendCreateDescriptor(int kind, struct descriptor **descriptor) {
    *descriptor = calloc(1, sizeof **descriptor);
    (*descriptor)->operation = operation_name(kind);
    return 0;
}

int cudnnBackendDestroyDescriptor(struct descriptor *descriptor) {
    free(descriptor);
    return 0;
}

static void inherit(struct descriptor *heir, const struct descriptor *from) {
    if (from && from->operation)
        heir->operation = from->operation;
}

int cudnnBackendSetAttribute(struct descriptor *descriptor, int attribute, int type, int64_t count, void *values) {
    if (type == ATTRIBUTE_DESCRIPTOR && count > 0)
        inherit(descriptor, *(struct descriptor **)values);
    return 0;
}

/* There is one of everything, and every number is 0: one engine, which needs no workspace. */
int cudnnBackendGetAttribute(
    struct descriptor *descriptor, int attribute, int type, int64_t wanted, int64_t *count, void *values
) {
    int is_known = type == ATTRIBUTE_DESCRIPTOR || type == ATTRIBUTE_INT64 || type == ATTRIBUTE_INT32;
    if (count)
        *count = is_known;
    if (wanted == 0 || !values)
        return 0;
    if (type == ATTRIBUTE_INT64)
        *(int64_t *)values = 0;
    if (type == ATTRIBUTE_INT32)
        *(int32_t *)values = 0;
    if (type == ATTRIBUTE_DESCRIPTOR && *(struct descriptor **)values)
        inherit(*(struct descriptor **)values, descriptor);
    return 0;
}

int cudnnBackendExecute(void *handle, struct descriptor *plan, struct descriptor *pointers) {
    static const char other[] = "cudnn_graph";
    const char *name = plan->operation ? plan->operation : other;
    if (plan->operation)
        null_gpu_count(CONVOLUTIONS);
    null_gpu_count_launch(name, name);
    return 0;
}
