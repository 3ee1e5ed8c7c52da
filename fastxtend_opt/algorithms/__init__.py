"One module per algorithm. Importing any of them makes fastai's `Learner` add the callbacks that an optimizer needs (`training.learner`)"
from ..training import learner
