//! Expert expansion for mixture-of-experts: when to split an expert, and the arithmetic of the split
