"""A null GPU: CUDA code paths on a machine without a device.

PyTorch's own CUDA build, preloaded with a stand-in for NVIDIA's libraries, sees one GPU. Dispatch, autocast, the
caching allocator, streams, graphs, pinned memory and Triton's compiler are the real ones; only the kernels do
nothing. What is launched, copied, allocated and waited for is counted exactly. Values and times mean nothing:
a result is whatever the memory held, zeros if it is fresh.

    python tests/null_gpu/launch.py [--capability 8.0] train.py --config ...

runs a script on the null GPU; tests/test_null_gpu.py runs the files named check_*.py of this folder.
"""
