"""The graphs in precisions other than fp32."""
