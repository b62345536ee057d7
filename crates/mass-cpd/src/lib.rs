//! Online and offline change-point detection with calibrated p-values
