"""What a run shows and records: metrics, TensorBoard, progress, throughput, traces."""
