"""The segments in other precisions than fp32."""
