# What a reader of the first page has made, and files as they are found elsewhere.
msmdiff pretrain --mask 0.9 --run primer
msmdiff finetune --ckpt primer --conditional --run tuned
msmdiff sample tuned --n 100 --cfg 1.5
