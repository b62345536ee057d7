//! Data, baselines, experiments and reports for MASS
