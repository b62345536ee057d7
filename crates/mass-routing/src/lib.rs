//! Mixture-of-experts routing: Top-p and its rivals, with exact gradients and a plan for grouped matmul
