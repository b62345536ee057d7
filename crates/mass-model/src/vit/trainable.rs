use super::VitClassifier;
use crate::mixtures::Mixtures;
use crate::nn::MoeLayer;
use crate::param::{Param, Parameters, join};

/// The part of a model above a frozen trunk: the later blocks, the final norm and the head.
///
/// Names are those of the whole model, so that optimiser state serves both.
#[derive(Debug)]
pub struct Trainable<'m> {
    pub(super) model: &'m mut VitClassifier,
    pub(super) blocks: usize,
}

impl Parameters for Trainable<'_> {
    fn visit<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a Param)) {
        for (b, block) in self.model.blocks.iter().enumerate().skip(self.blocks) {
            block.visit(&join(prefix, &format!("blocks.{b}")), f);
        }
        self.model.norm.visit(&join(prefix, "norm"), f);
        self.model.head.visit(&join(prefix, "head"), f);
    }

    fn visit_mut(&mut self, prefix: &str, f: &mut dyn FnMut(String, &mut Param)) {
        let blocks = self.model.blocks.iter_mut().enumerate();
        for (b, block) in blocks.skip(self.blocks) {
            block.visit_mut(&join(prefix, &format!("blocks.{b}")), f);
        }
        self.model.norm.visit_mut(&join(prefix, "norm"), f);
        self.model.head.visit_mut(&join(prefix, "head"), f);
    }
}

/// No mixture is in a frozen trunk, so these are all the model has.
impl Mixtures for Trainable<'_> {
    fn visit_mixtures<'a>(&'a self, prefix: &str, f: &mut dyn FnMut(String, &'a MoeLayer)) {
        self.model.visit_mixtures(prefix, f);
    }

    fn visit_mixtures_mut<'a>(
        &'a mut self,
        prefix: &str,
        f: &mut dyn FnMut(String, &'a mut MoeLayer),
    ) {
        self.model.visit_mixtures_mut(prefix, f);
    }
}
