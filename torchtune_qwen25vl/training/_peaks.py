"""How many operations GPUs do at best, by the exact names that torch has for them.

Dense products of bf16 added up in fp32, TFLOP/s, by the makers' data sheets and white papers:
without sparsity, at the power that the card ships with. Cards for games add up in fp32 at half
rate, so a 4090 has 165 where its box says 330. Where a sheet has no such number, it is that of the
papers for cards of its kind, in each multiprocessor and clock at its boost clock 512 operations
for games and 1,024 for workstations: of the 3090 Ti, 4090, 5090 and RTX 6000 Ada it is exact.
B300 and GB300 are by tables of others.
"""

PEAK_TFLOPS = {
    **dict.fromkeys(
        (
            "NVIDIA A100-SXM4-40GB",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA A100-SXM-64GB",
            "NVIDIA A100-PCIE-40GB",
            "NVIDIA A100 80GB PCIe",
            "NVIDIA A800-SXM4-40GB",
            "NVIDIA A800-SXM4-80GB",
            "NVIDIA A800 80GB PCIe",
        ),
        312.0,
    ),
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX A5000": 111.1,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 3090 Ti": 80.0,
    "NVIDIA GeForce RTX 3080 Ti": 68.2,
    "NVIDIA GeForce RTX 3070": 40.6,
    "NVIDIA L40S": 362.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA RTX 5000 Ada Generation": 261.1,
    "NVIDIA RTX 4500 Ada Generation": 158.5,
    "NVIDIA RTX 4000 Ada Generation": 106.9,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 4080 SUPER": 104.4,
    "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 4070 Ti SUPER": 88.2,
    "NVIDIA GeForce RTX 4070 Ti": 80.2,
    "NVIDIA GeForce RTX 4070 SUPER": 71.0,
    "NVIDIA GeForce RTX 4070": 58.3,
    "NVIDIA GeForce RTX 4060 Ti": 44.1,
    "NVIDIA GeForce RTX 4060": 30.2,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H800": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA H20": 148.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA GH200 144G HBM3e": 989.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "NVIDIA B300 SXM6 AC": 2250.0,
    "NVIDIA GB300": 2500.0,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 5080": 112.6,
    "NVIDIA GeForce RTX 5070 Ti": 87.9,
    "NVIDIA GeForce RTX 5070": 61.7,
    "NVIDIA GeForce RTX 5060 Ti": 47.4,
    "NVIDIA GeForce RTX 5060": 38.4,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 503.8,
}
