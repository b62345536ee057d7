//! Mixture-of-experts layers and models on dfdx, with fused CPU kernels
