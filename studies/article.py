"""The article's claims by id, and what the literature has measured about each."""

from bnbench.study import Claim

CLAIMS = (
    Claim(
        "C0",
        "Batch normalization works by reducing internal covariate shift.",
        (
            "Santurkar et al. (2018) find that the stability of the layers' inputs has little to do with"
            " the success of batch normalization; they see a smoother loss surface instead (abstract).",
        ),
    ),
    Claim(
        "C1",
        "It speeds up training.",
        (
            "Ioffe & Szegedy (2015): to 72.2 % on ImageNet, Inception took 31.0 million steps, with batch"
            " normalization 13.3 million (2.3 times fewer) at the same learning rate, and 2.1 million (14"
            " times fewer) with the rate raised fivefold and the recipe changed.",
            "Bjorck et al. (2018) attribute the faster convergence to the larger learning rates that it"
            " allows (abstract).",
        ),
    ),
    Claim(
        "C2",
        "It makes training less sensitive to the initial weights and to the learning rate.",
        (
            "Ioffe & Szegedy (2015) report much higher usable learning rates and less care about"
            " initialization.",
            "Bjorck et al. (2018): without it, activations grow with depth and limit the learning rate"
            " (abstract).",
            "Zhang et al. (2019, Fixup): an initialization alone, with Mixup, trains ResNet-50 without"
            " any normalization to 76.0 % on ImageNet.",
        ),
    ),
    Claim(
        "C3",
        "It regularizes, through the noise of its batch statistics.",
        (
            "Luo et al. (2019) derive the regularization as population normalization plus a decay of the"
            " scale parameter (abstract).",
            "Wu & He (2018): group normalization, which has no batch noise, had lower training but higher"
            " validation error; on CIFAR-10 7.3 % error against about 6.0 %. With VGG-16 it was 0.4 points"
            " better.",
            "Summers & Dinneen (2020): ghost batch normalization regularizes at small and medium batch"
            " sizes too (abstract).",
        ),
    ),
    Claim(
        "C4",
        "It prevents vanishing and exploding gradients.",
        (
            "Yang et al. (2019, Theorem 8): at initialization the gradient's norm grows 1.21 times a"
            " layer in a ReLU network with batch normalization and large batches, more with small ones;"
            " beyond about 50 layers such networks did not train on MNIST.",
            "Meterez et al. (2024) construct batch normalization without this explosion (abstract).",
            "Daneshmand et al. (2020): it keeps the rank of deep representations from collapsing.",
        ),
    ),
    Claim(
        "P1",
        "Initialize the weights with Xavier or He.",
        (
            "Mishkin et al. (2017): with batch normalization, CaffeNet from orthogonal and from data-"
            " dependent initial weights ended within 0.4 points of each other on ImageNet.",
        ),
    ),
    Claim(
        "P2",
        "Put it after the linear map and before the activation.",
        (
            "Mishkin et al. (2017), single runs on ImageNet: CaffeNet 47.4 % with it before the"
            " activation, 49.9 % after, 47.1 % without; GoogLeNet 60.3 % before, 59.6 % after, 61.9 %"
            " without.",
        ),
    ),
    Claim(
        "P3",
        "Choose the batch size with care: small ones are noisy, large ones converge more slowly.",
        (
            "Wu & He (2018), ResNet-50 on ImageNet: the error rises from 23.6 % at 32 images a GPU to"
            " 27.3 % at 4 and 34.7 % at 2; with group normalization it stays at 24.1 to 24.2 %.",
            "Mishkin et al. (2017): without batch normalization, batch sizes from 1 to 512 ended alike"
            " (46.9 to 47.5 %) once the learning rate was scaled.",
        ),
    ),
    Claim(
        "P4",
        "The scale parameter controls the regularization: the higher, the stronger.",
        (
            "Luo et al. (2019) find the opposite sign in theory: the implicit penalty is a decay of the"
            " scale, so that regularization shrinks it (abstract).",
        ),
    ),
    Claim(
        "P5",
        "Combine it with dropout or weight decay.",
        (
            "Li et al. (2019): dropout before batch normalization shifts the variance between training"
            " and test and hurts; wide networks suffer less (abstract).",
            "Mishkin et al. (2017), CaffeNet with batch normalization on ImageNet: 49.9 % with dropout"
            " 0.5 in the last layers, 52.7 % with 0.2, 51.3 % with none.",
        ),
    ),
    Claim(
        "C5",
        "Networks with it generalize better (the article's conclusion).",
        (
            "Mishkin et al. (2017), single runs on ImageNet: CaffeNet gained 2.8 points with it at its"
            " best place; GoogLeNet was best without.",
            "Wu & He (2018), ResNet-50 on ImageNet at 32 images a GPU: 23.6 % error, against 24.1 % with"
            " group normalization.",
        ),
    ),
)
