//! Gauss-Legendre quadrature.

/// Nodes and weights of the `n`-point Gauss-Legendre rule on `[0, length]`.
///
/// Newton's method on the Legendre polynomial, from the usual asymptotic guess.
pub(super) fn gauss_legendre(n: usize, length: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut nodes, mut weights) = (vec![0.0; n], vec![0.0; n]);
    let size = n as f64;
    for i in 0..n.div_ceil(2) {
        let mut x = (std::f64::consts::PI * (i as f64 + 0.75) / (size + 0.5)).cos();
        let mut slope = 1.0;
        for _ in 0..100 {
            let (mut p, mut previous) = (1.0, 0.0);
            for j in 0..n {
                let j = j as f64;
                (p, previous) = (((2.0 * j + 1.0) * x * p - j * previous) / (j + 1.0), p);
            }
            slope = size * (x * p - previous) / (x * x - 1.0);
            let step = p / slope;
            x -= step;
            if step.abs() < 1e-15 {
                break;
            }
        }
        let weight = length / ((1.0 - x * x) * slope * slope);
        nodes[i] = 0.5 * length * (1.0 - x);
        nodes[n - 1 - i] = 0.5 * length * (1.0 + x);
        weights[i] = weight;
        weights[n - 1 - i] = weight;
    }
    (nodes, weights)
}

#[cfg(test)]
mod tests {
    use super::gauss_legendre;

    #[test]
    fn is_exact_for_polynomials_of_degree_two_n_minus_one() {
        for n in 1..40usize {
            let (x, w) = gauss_legendre(n, 2.0);
            for degree in [0, n, 2 * n - 1] {
                let got: f64 = x
                    .iter()
                    .zip(&w)
                    .map(|(x, w)| w * x.powi(degree as i32))
                    .sum();
                let want = 2f64.powi(degree as i32 + 1) / (degree + 1) as f64;
                assert!((got / want - 1.0).abs() < 1e-12, "n {n}, degree {degree}");
            }
        }
    }
}
