"""GPUs that a plan can be made for: memory, peaks, bandwidths and an assumed price, each with its source. All peaks are dense.

Sources: [datasheet] NVIDIA's data sheets of H100 SXM, H200 SXM, DGX B200 and GB200 NVL72 (sparse peaks there, halved here);
[assumed: why] a choice of ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU in the node that it usually sits in. Bandwidths are bytes/s in one direction."""

    name: str
    memory_bytes: int
    """The data sheet's GB taken as 10^9. The card has some 7% more (nvidia-smi shows 81,559 MiB on an 80 GB H100), which is left to
    the CUDA context, NCCL's buffers and fragmentation [assumed: that is about what they take]."""
    peak_bf16_flops: float
    peak_fp8_flops: float
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float
    """Of one GPU to the others of its NVLink domain."""
    network_bytes_per_second: float
    """Of one GPU to other nodes."""
    host_bytes_per_second: float
    """Of one GPU to the host's memory."""
    host_memory_bytes: int
    """A GPU's part of the host's memory."""
    nvlink_domain_gpus: int
    price_per_hour: float
    """US dollars per GPU-hour [assumed: a round figure of what clouds ask on contract; `--price-per-gpu-hour` sets yours]."""
    architecture: str
    """hopper or blackwell: how far its kernels come to the peak (recipes/throughput.py)."""


GPUS = {
    "h100": Gpu(
        name="h100",
        memory_bytes=80_000_000_000,  # [datasheet] 80 GB
        peak_bf16_flops=989e12,  # [datasheet] 1,979 sparse
        peak_fp8_flops=1979e12,  # [datasheet] 3,958 sparse
        memory_bytes_per_second=3.35e12,  # [datasheet]
        nvlink_bytes_per_second=450e9,  # [datasheet] 900 GB/s in both directions
        network_bytes_per_second=50e9,  # [datasheet] DGX H100: a 400 Gb/s adapter per GPU
        host_bytes_per_second=64e9,  # [datasheet] PCIe 5.0 x16: 128 GB/s in both directions
        host_memory_bytes=256_000_000_000,  # [datasheet] DGX H100: 2 TB for 8 GPUs
        nvlink_domain_gpus=8,  # [datasheet] DGX H100
        price_per_hour=2.5,
        architecture="hopper",
    ),
    "h200": Gpu(
        name="h200",
        memory_bytes=141_000_000_000,  # [datasheet] 141 GB
        peak_bf16_flops=989e12,  # [datasheet] as the H100
        peak_fp8_flops=1979e12,  # [datasheet] as the H100
        memory_bytes_per_second=4.8e12,  # [datasheet]
        nvlink_bytes_per_second=450e9,  # [datasheet] 900 GB/s in both directions
        network_bytes_per_second=50e9,  # [datasheet] DGX H200: a 400 Gb/s adapter per GPU
        host_bytes_per_second=64e9,  # [datasheet] PCIe 5.0 x16: 128 GB/s in both directions
        host_memory_bytes=256_000_000_000,  # [datasheet] DGX H200: 2 TB for 8 GPUs
        nvlink_domain_gpus=8,  # [datasheet] DGX H200
        price_per_hour=3.0,
        architecture="hopper",
    ),
    "b200": Gpu(
        name="b200",
        memory_bytes=180_000_000_000,  # [datasheet] DGX B200: 1,440 GB in 8 GPUs
        peak_bf16_flops=2250e12,  # [datasheet] 4,500 sparse
        peak_fp8_flops=4500e12,  # [datasheet] DGX B200: 72 PFLOP/s sparse in 8 GPUs
        memory_bytes_per_second=8e12,  # [datasheet] DGX B200: 64 TB/s in 8 GPUs
        nvlink_bytes_per_second=900e9,  # [datasheet] 1.8 TB/s in both directions
        network_bytes_per_second=50e9,  # [datasheet] DGX B200: a 400 Gb/s adapter per GPU
        host_bytes_per_second=64e9,  # [datasheet] PCIe 5.0 x16: 128 GB/s in both directions
        host_memory_bytes=256_000_000_000,  # [datasheet] DGX B200: 2 TB for 8 GPUs, or 4
        nvlink_domain_gpus=8,  # [datasheet] DGX B200
        price_per_hour=5.0,
        architecture="blackwell",
    ),
    "gb200": Gpu(
        name="gb200",
        memory_bytes=186_000_000_000,  # [datasheet] NVL72: 13.4 TB in 72 GPUs
        peak_bf16_flops=2500e12,  # [datasheet] NVL72: 360 PFLOP/s sparse in 72 GPUs
        peak_fp8_flops=5000e12,  # [datasheet] NVL72: 720 PFLOP/s sparse in 72 GPUs
        memory_bytes_per_second=8e12,  # [datasheet] NVL72: 576 TB/s in 72 GPUs
        nvlink_bytes_per_second=900e9,  # [datasheet] 1.8 TB/s in both directions
        network_bytes_per_second=50e9,  # [datasheet] a 400 Gb/s adapter per GPU, as in the cluster that IBM describes
        host_bytes_per_second=225e9,  # [derived] NVLink-C2C, 900 GB/s in both directions for the two GPUs of a Grace
        host_memory_bytes=240_000_000_000,  # [datasheet] GB200: 480 GB of LPDDR5X for two GPUs
        nvlink_domain_gpus=72,  # [datasheet] NVL72
        price_per_hour=6.0,
        architecture="blackwell",
    ),
}
"""Name as in `cluster.gpu` -> GPU. CPU is none of them: its speed is not planned."""

PEAK_BF16_FLOPS = {name: gpu.peak_bf16_flops for name, gpu in GPUS.items()}
"""Dense bf16 FLOP/s of one GPU: what utilisation (MFU) is counted against, also where a stage runs in FP8."""
