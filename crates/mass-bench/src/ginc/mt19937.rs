//! The random numbers that NumPy's legacy generator draws, so that a seed of the original Python
//! program gives the original instance here.

/// Mersenne Twister with NumPy's seeding (`np.random.seed(int)`) and conversions.
pub(super) struct Mt19937 {
    state: [u32; 624],
    next: usize,
}

impl Mt19937 {
    pub(super) fn new(seed: u32) -> Self {
        let mut state = [0u32; 624];
        state[0] = seed;
        for i in 1..624 {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(i as u32);
        }
        Self { state, next: 624 }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == 624 {
            for k in 0..624 {
                let y = (self.state[k] & 0x8000_0000) | (self.state[(k + 1) % 624] & 0x7fff_ffff);
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[k] = self.state[(k + 397) % 624] ^ (y >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `np.random.rand()`: 53 bits in [0, 1).
    pub(super) fn uniform(&mut self) -> f64 {
        let (high, low) = (self.next_u32() >> 5, self.next_u32() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// Uniform in 0..=max by masked rejection: `np.random.randint(0, max + 1)`.
    pub(super) fn at_most(&mut self, max: u32) -> u32 {
        // NumPy draws nothing for a range of one value.
        if max == 0 {
            return 0;
        }
        let mask = u32::MAX >> max.leading_zeros();
        loop {
            let value = self.next_u32() & mask;
            if value <= max {
                return value;
            }
        }
    }

    /// `np.random.permutation(n)`.
    pub(super) fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut permutation: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            permutation.swap(i, self.at_most(i as u32) as usize);
        }
        permutation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values: NumPy, `np.random.seed(42)`, then the call named.
    #[test]
    fn agrees_with_numpy() {
        let mut rng = Mt19937::new(42);
        for want in [0.3745401188473625, 0.9507143064099162, 0.7319939418114051] {
            assert_eq!(rng.uniform(), want);
        }
        // np.random.randint(0, 100, 10)
        let mut rng = Mt19937::new(42);
        let draws: Vec<u32> = (0..10).map(|_| rng.at_most(99)).collect();
        assert_eq!(draws, [51, 92, 14, 71, 60, 20, 82, 86, 74, 74]);
        // np.random.permutation(10)
        assert_eq!(
            Mt19937::new(42).permutation(10),
            [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]
        );
    }

    #[test]
    fn first_outputs_of_the_reference_implementation() {
        // init_genrand(5489), the C++ standard library's default seed.
        let mut rng = Mt19937::new(5489);
        assert_eq!(rng.next_u32(), 3_499_211_612);
        // The C++ standard requires this of the 10000th output.
        for _ in 1..9999 {
            rng.next_u32();
        }
        assert_eq!(rng.next_u32(), 4_123_659_995);
    }
}
